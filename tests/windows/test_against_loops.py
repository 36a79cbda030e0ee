"""Swin with windows left out against loops over windows, and what passes through."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from naive_windows import run_swin, windows_of
from windows_zoo import SIZES, build, images

import tokenprune

torch.set_num_threads(1)

# Of each pair of blocks: in the second stage more windows go in the later pair.
RATIOS = (0.6, 0.35, 0.6)
IN_BLOCKS = ((0.6, 0.6), (0.35, 0.35, 0.6, 0.6))
# The table of Swin v2's coordinates is in float32, whatever the model is in.
TOLERANCE = {"v1": 1e-9, "v2": 1e-6}


def run(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(x)
    return output


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_output_and_windows_are_those_of_the_loops(name: str, size: tuple[int, int]) -> None:
    model, x = build(name, size).double(), images(size).double()
    expected, chosen = run_swin(model, x, IN_BLOCKS)
    plain = run(model, x)
    tokenprune.patch(model, "sparsevit", ratios=RATIOS)
    with tokenprune.record(model) as recording:
        got = run(model, x)
    assert (got - plain).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[name], atol=TOLERANCE[name])
    for place in recording.forwards[0].places:
        stage, block = (int(part) for part in place.name.split(".")[1::2])
        module = model.layers[stage].blocks[block]
        windows = windows_of(*place.grid, tuple(module.window_size), tuple(module.shift_size))
        for image, kept in enumerate(chosen[place.name]):
            tokens = sorted(t for w in kept for t in windows[w] if t is not None)
            assert place.kept[image][place.kept[image] >= 0].tolist() == tokens
            assert (place.source[image] >= 0).nonzero().flatten().tolist() == tokens
    assert len(recording.forwards[0].places) == 6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_other_windows_pass_through_bit_for_bit(name: str, size: tuple[int, int]) -> None:
    model, x = build(name, size), images(size)
    tokenprune.patch(model, "sparsevit", keep=0.4)
    entered, left = {}, {}
    for block, module in model.named_modules():
        if block.count(".") == 3 and ".blocks." in block:
            module.register_forward_pre_hook(lambda m, args, block=block: entered.update({block: args[0].clone()}))
            module.register_forward_hook(lambda m, args, out, block=block: left.update({block: out.clone()}))
    with tokenprune.record(model) as recording:
        run(model, x)
    for place in recording.forwards[0].places:
        computed = place.source >= 0
        before, after = entered[place.name].flatten(1, 2), left[place.name].flatten(1, 2)
        assert torch.equal(before[~computed], after[~computed])
        assert (before[computed] != after[computed]).any(-1).all()
        assert 0 < int(computed.sum()) < computed.numel()


def test_later_blocks_of_a_stage_compute_some_of_the_earlier_ones_windows() -> None:
    model, x = build(), images()
    tokenprune.patch(model, "sparsevit", ratios=(0.0, 0.3, 0.7))
    with tokenprune.record(model) as recording:
        run(model, x)
    places = recording.forwards[0].places
    assert [place.name for place in places] == [f"layers.1.blocks.{b}" for b in range(4)]
    for earlier, later in (places[::2], places[1::2]):
        assert (earlier.source >= 0)[later.source >= 0].all()
        assert (later.source >= 0).sum() < (earlier.source >= 0).sum()


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, x = build(size=SIZES[1]).double(), images(SIZES[1], 3).double()
    tokenprune.patch(model, "sparsevit", keep=0.4)
    together = run(model, x)
    alone = torch.cat([run(model, one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(run(model, x), together)


def test_windows_of_the_whole_side_are_not_shifted() -> None:
    """timm makes a window as large as a smaller grid, and does not roll it."""
    model, x = build(size=(12, 24)).double(), images((12, 24)).double()
    assert [tuple(b.shift_size) for b in model.layers[1].blocks] == [(0, 0), (0, 1)] * 2
    expected = run_swin(model, x, ((0.5, 0.5), (0.4,) * 4))[0]
    tokenprune.patch(model, "sparsevit", ratios=(0.5, 0.4))
    torch.testing.assert_close(run(model, x), expected, rtol=1e-9, atol=1e-9)


def test_sizes_that_change_from_call_to_call() -> None:
    model = build(dynamic_img_size=True).double()
    tokenprune.patch(model, "sparsevit", ratios=RATIOS)
    for size in (SIZES[0], (42, 30), SIZES[1]):
        x = images(size).double()
        expected = run_swin(model, x, IN_BLOCKS)[0]
        torch.testing.assert_close(run(model, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_the_baselines_choose_windows(name: str) -> None:
    model, x = build(), images()
    tokenprune.patch(model, name, keep=0.5)
    with tokenprune.record(model) as recording:
        run(model, x)
    computed = [place.source[0] >= 0 for place in recording.forwards[0].places]
    assert [int(c.sum()) for c in computed] == [18 * 6] * 2 + [5 * 6] * 4
    if name == "uniform":
        first = [min(t for t in w if t is not None) for w in windows_of(18, 12, (3, 2), (0, 0))]
        windows = [w for w, token in enumerate(first) if computed[0][token]]
        assert windows == list(range(1, 36, 2))
    assert all(torch.equal(a, b) for a, b in pairwise(computed[2::2]))
