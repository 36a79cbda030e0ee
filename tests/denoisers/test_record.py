"""`tokenprune.record` on denoisers: which tokens each stack computes at each step."""

import pytest
import torch
from denoisers_zoo import build, run

import tokenprune

torch.set_num_threads(1)


def at(x, timestep):
    return {**x, "timestep": 0 * x["timestep"] + timestep}


@pytest.mark.parametrize("method", ["at_edm", "ras", pytest.param("random", marks=pytest.mark.full)])
def test_the_recorded_tokens_are_those_that_a_block_changes(method):
    # A token left out passes a transformer's block unchanged.
    model, inputs = build("dit")
    x = inputs(2, 16, 16)
    tokenprune.patch(model, method, **({} if method == "ras" else {"keep": 0.4, "steps": {(0.0, 0.5): 0.0}}))
    changed, entered = [], []
    block = model.transformer_blocks[1]
    block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    block.register_forward_hook(lambda _, args, out: changed.append((out != entered[-1]).any(-1)))
    steps = (900, 700, 500, 300, 250, 200) if method == "ras" else (900, 100)
    with tokenprune.record(model) as recording:
        for timestep in steps:
            run(model, at(x, timestep))
    assert [forward.timestep for forward in recording.forwards] == list(steps)
    assert all(forward.grid == (16, 16) for forward in recording.forwards)
    fewer = 0
    for forward, computed in zip(recording.forwards, changed, strict=True):
        if computed.all():
            assert forward.places == []
            continue
        fewer += 1
        place = next(place for place in forward.places if place.name.startswith("transformer_blocks.0-"))
        assert place.grid == (8, 8)
        assert place.sizes is None
        assert torch.equal(torch.zeros(2, 64).bool().scatter(1, place.kept, True), computed)
        for image in range(2):
            for token in range(64):
                position = int(place.source[image, token])
                assert place.kept[image, position] == token if computed[image, token] else position == -1
    assert fewer >= 1


def test_every_level_of_a_unet_is_recorded_and_both_calls_of_a_step_are_the_same():
    model, inputs = build("unet_sdxl")
    x = inputs(1, 16, 12)
    tokenprune.patch(model, "random", keep=0.5)
    with tokenprune.record(model) as recording:
        run(model, x)
        run(model, {**x, "encoder_hidden_states": -x["encoder_hidden_states"]})
    run(model, x)
    told = {place["name"]: place["tokens_out"] for place in tokenprune.report(model).to_dict()["places"]}
    first, second = ({place.name: place for place in forward.places} for forward in recording.forwards)
    assert {name: place.kept.shape[1] for name, place in first.items()} == told
    assert {place.grid for place in first.values()} == {(8, 6), (4, 3)}
    assert all(torch.equal(place.kept, second[name].kept) for name, place in first.items())


def test_merged_tokens_are_recorded_in_each_block():
    model, inputs = build("pixart")
    tokenprune.patch(model, "tomesd", keep=0.5)
    with tokenprune.record(model) as recording:
        run(model, inputs(2, 16, 12))
    (forward,) = recording.forwards
    assert [place.name for place in forward.places] == [f"transformer_blocks.{i}" for i in range(4)]
    for place in forward.places:
        assert place.sizes.sum(1).tolist() == [48.0, 48.0]
        assert place.source.min() == 0
        counts = torch.stack([torch.bincount(row, minlength=24) for row in place.source])
        assert torch.equal(counts.float(), place.sizes)


def test_a_region_is_recorded_and_nothing_is_where_all_is_computed():
    model, inputs = build("flux")
    mask = torch.zeros(16, 12).bool()
    mask[:4, :4] = True
    tokenprune.patch(model, "region", mask=mask, ring=0)
    with tokenprune.record(model) as recording:
        for timestep in (0.9, 0.7):
            run(model, at(inputs(1, 16, 12), timestep))
    dense, partial = recording.forwards
    assert dense.places == []
    assert dense.grid is None
    assert len(partial.places) == len({place.name for place in partial.places}) > 1
    assert all(place.kept.tolist() == [[0, 1, 6, 7]] for place in partial.places)
    tokenprune.patch(model, "random", keep=1.0)
    with tokenprune.record(model) as recording:
        run(model, inputs(1, 16, 12))
    assert [forward.places for forward in recording.forwards] == [[]]
