"""Methods that run parts of a block on fewer tokens, against loops: tomesd, todo, toma."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from denoisers_zoo import build, gradients, run
from torch.nn import functional

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.denoisers import run as runs
from tokenprune.evals.digits_checkpoints import trained
from tokenprune.evals.digits_denoisers import DIT
from tokenprune.evals.drawing_orders import drawing_orders
from tokenprune.methods import toma, tomesd
from tokenprune.scores.fixed import hashed_scores
from tokenprune.selection.facility import (
    attend_to_destinations,
    attend_within_tiles,
    facility_destinations,
    greedy_facilities,
)
from tokenprune.selection.tiles import cut
from tokenprune.selection.windows import keep_smaller_grid, merge_into_windows

torch.set_num_threads(1)

METHODS = ("tomesd", "todo", "toma")


def record_of(x, grid, step=None):
    origin = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    return AttentionRecord(x, origin, 0, 0, 1, grid, has_class_token=False, step=step)


def naive_merge(x, scores, grid, keep, sy, sx):
    """One image x [n, C] -> the group of each token, as the position of the token that takes it in."""
    rows, columns = grid
    chosen = []
    for i, j in product(range(rows // sy), range(columns // sx)):
        window = [(i * sy + a) * columns + j * sx + b for a in range(sy) for b in range(sx)]
        chosen.append(max(window, key=lambda p: (scores[p].item(), -p)))
    unit = [row / row.norm() for row in x]
    best = {}
    for p in range(rows * columns):
        if p not in chosen:
            best[p] = max((float(unit[p] @ unit[c]), -c) for c in chosen)
    into = list(range(rows * columns))
    for p in sorted(best, key=lambda p: -best[p][0])[: rows * columns - keep]:
        into[p] = -best[p][1]
    return into


def averaged(x, into):
    """Each token of x [n, C] replaced by the average of its group."""
    return torch.stack(
        [torch.stack([x[q] for q in range(len(x)) if into[q] == into[p]]).mean(0) for p in range(len(x))]
    )


@pytest.mark.parametrize(("grid", "window", "keep"), [((6, 8), (2, 2), 24), ((5, 7), (2, 3), 11), ((4, 4), (2, 2), 4)])
def test_tokens_are_merged_as_in_loops(grid, window, keep):
    g = torch.Generator().manual_seed(keep)
    x = torch.randn(2, grid[0] * grid[1], 3, generator=g)
    scores = torch.rand(2, x.shape[1], generator=g)
    reduction = merge_into_windows(scores, record_of(x, grid), keep, sy=window[0], sx=window[1])
    assert reduction.tokens == keep
    back = reduction.unmerge(reduction(x), x.shape[1])
    for image in range(2):
        into = naive_merge(x[image], scores[image], grid, keep, *window)
        torch.testing.assert_close(back[image], averaged(x[image], into))
        assert sorted(reduction.kept[image].tolist()) == sorted(set(into))


def test_the_random_tokens_are_the_same_for_all_images_and_others_at_each_step():
    x = torch.randn(3, 64, 2, generator=torch.Generator().manual_seed(0))

    def chosen(step, seed=3, **others):
        """What takes all others in, by image."""
        record = replace(record_of(x, (8, 8), torch.tensor(step)), **others)
        return tomesd.tomesd(seed=seed).reduce(record, 16).kept

    first = chosen(7)
    best = hashed_scores(record_of(x, (8, 8), torch.tensor(7)), 3, each_step=True)[0].view(4, 2, 4, 2)
    inside = best.transpose(1, 2).flatten(2).argmax(-1)  # of each window
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    expected = (2 * rows + inside // 2) * 8 + 2 * columns + inside % 2
    assert torch.equal(first, expected.flatten().sort().values.expand(3, -1))
    assert torch.equal(first, chosen(7))
    for other in (chosen(8), chosen(7, seed=4), chosen(7, place=2)):
        assert not torch.equal(first, other)
    shared = {}  # in a forward the places of one size draw together, and each the same as alone
    for place in (2, 0, 5):
        assert torch.equal(chosen(7, place=place, peers=(5, 0, 2), shared=shared), chosen(7, place=place))
    assert len(shared) == 1
    windows = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
    many = torch.cat([(windows[..., None] == chosen(s)[0]).any(-1).int().argmax(-1) for s in range(100)])
    assert torch.bincount(many, minlength=4).min() > 320  # of 1600, 400 expected


def block_run(model, inputs, name):
    """What the block `name` got and gave in a forward, and the last arguments."""
    seen = {}
    block = model.get_submodule(name)
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
        ),
        block.register_forward_hook(lambda _, args, output: seen.update(output=output)),
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return block, seen


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize("parts", [(), ("merge_crossattn",), ("merge_mlp",)], ids=str)
def test_a_block_merges_around_the_parts_asked_for(parts):
    model, inputs = build("unet_sd")
    x = inputs(2, 3, 2)  # a grid of 12 x 8
    tokenprune.patch(model, "tomesd", keep=0.4, use_rand=False, steps={}, **dict.fromkeys(parts, True))
    block, seen = block_run(model, x, BLOCK)
    tokenprune.unpatch(model)
    hidden = (seen["args"] or (seen["kwargs"]["hidden_states"],))[0]
    text = x["encoder_hidden_states"]
    n, keep = 96, 39
    first = -torch.arange(n).float()  # the first of each window scores highest
    expected = []
    with torch.no_grad():
        for image in range(2):
            into = naive_merge(hidden[image], first, (12, 8), keep, 2, 2)
            groups = sorted(set(into))
            back = [groups.index(p) for p in into]

            def around(part, x, on, *args, groups=groups, back=back, into=into, **kwargs):
                if not on:
                    return part(x[None], *args, **kwargs)[0]
                return part(averaged(x, into)[groups][None], *args, **kwargs)[0][back]

            h = hidden[image]
            h = h + around(block.attn1, block.norm1(h), True)
            h = h + around(
                block.attn2, block.norm2(h), "merge_crossattn" in parts, encoder_hidden_states=text[image : image + 1]
            )
            expected.append(h + around(block.ff, block.norm3(h), "merge_mlp" in parts))
    torch.testing.assert_close(seen["output"], torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_keys_come_from_the_nearest_tokens_of_a_coarser_grid():
    model, inputs = build("unet_sd")
    x = inputs(2, 3, 2)
    tokenprune.patch(model, "todo", steps={})
    block, seen = block_run(model, x, BLOCK)
    assert {p["tokens_out"] for p in tokenprune.report(model).to_dict()["places"]} == {24}
    tokenprune.unpatch(model)
    h = (seen["args"] or (seen["kwargs"]["hidden_states"],))[0]
    with torch.no_grad():
        normed = block.norm1(h)
        coarse = functional.interpolate(
            normed.transpose(1, 2).unflatten(2, (12, 8)), scale_factor=0.5, mode="nearest-exact"
        )
        h = h + block.attn1(normed, encoder_hidden_states=coarse.flatten(2).transpose(1, 2))
        h = h + block.attn2(block.norm2(h), encoder_hidden_states=x["encoder_hidden_states"])
        h = h + block.ff(block.norm3(h))
    torch.testing.assert_close(seen["output"], h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "keep"), [((12, 9), 12), ((5, 7), 8), ((3, 3), 1), ((7, 2), 13), ((4, 6), 24)])
def test_a_coarser_grid_has_as_many_tokens_as_asked_for(grid, keep):
    kept = keep_smaller_grid(None, record_of(torch.zeros(2, grid[0] * grid[1], 1), grid), keep).kept
    assert len(set(kept[0].tolist())) == keep
    assert kept.min() >= 0
    assert kept.max() < grid[0] * grid[1]
    if (grid, keep) == ((12, 9), 12):
        place = torch.arange(108.0).view(1, 1, 12, 9)
        assert kept[0].tolist() == functional.interpolate(place, (4, 3), mode="nearest-exact").flatten().tolist()


def test_todo_is_refused_where_projections_are_fused():
    model, inputs = build("unet_sd")
    tokenprune.patch(model, "todo")
    model.fuse_qkv_projections()
    with pytest.raises(tokenprune.UnsupportedMethod, match="unfuse"):
        run(model, inputs(1, 3, 2))
    tokenprune.unpatch(model)
    with pytest.raises(tokenprune.UnsupportedMethod, match="unfuse"):
        tokenprune.patch(model, "todo")
    tokenprune.patch(model, "tomesd")  # merges before the projection
    run(model, inputs(1, 3, 2))


def test_facilities_are_chosen_greedily():
    x = torch.randn(3, 13, 4, generator=torch.Generator().manual_seed(0))
    x[2, 6] = x[2, 1]
    found = greedy_facilities(x, 13)
    for image in range(3):
        chosen = found[image].tolist()
        assert sorted(chosen) == list(range(13))
        unit = [row / row.norm() for row in x[image]]
        for i in range(13):
            value = {
                p: sum(max(float(u @ unit[j]) for j in [*chosen[:i], p]) for u in unit)
                for p in range(13)
                if p not in chosen[:i]
            }
            assert value[chosen[i]] >= max(value.values()) - 2e-3


def test_every_tile_has_its_share_of_the_destinations():
    x = torch.randn(2, 35, 4, generator=torch.Generator().manual_seed(1))
    found = facility_destinations(record_of(x, (5, 7)), cut((5, 7), 16, 2))
    assert found.shape == (2, 16)
    tiles = [
        [i * 7 + j for i in rows for j in columns]
        for rows in (range(2), range(2, 5))
        for columns in (range(3), range(3, 7))
    ]
    done = 0
    for tile in tiles:
        quota = 16 * (done + len(tile)) // 35 - 16 * done // 35
        done += len(tile)
        for image in range(2):
            expected = [tile[p] for p in greedy_facilities(x[image : image + 1, tile], quota)[0]]
            assert [p for p in found[image].tolist() if p in tile] == expected


@pytest.mark.parametrize(("grid", "keep"), [((5, 7), 16), ((4, 6), 12), ((3, 2), 1)])
def test_merging_within_tiles_is_merging_each_tile_alone(grid, keep):
    g = torch.Generator().manual_seed(keep)
    tokens = grid[0] * grid[1]
    x, y = torch.randn(2, tokens, 4, generator=g), torch.randn(2, keep, 5, generator=g)
    tiling = cut(grid, keep, 2)
    destinations = facility_destinations(record_of(x, grid), tiling)
    reduction = attend_within_tiles(destinations, record_of(x, grid), 0.3, tiling)
    merged, back, twice = reduction(x), reduction.unmerge(y, tokens), reduction.tiled(2)
    torch.testing.assert_close(twice.unmerge(twice(x.repeat(2, 1, 1)), tokens)[2:], reduction.unmerge(merged, tokens))
    source, sizes = reduction.source(tokens), reduction.merged_sizes(torch.ones(2, tokens))
    torch.testing.assert_close(sizes, torch.ones(2, keep))
    across, edge = (1, (grid[0], grid[1])) if keep < 4 else (2, (grid[0] // 2, grid[1] // 2))
    tile_of = [(p // grid[1] >= edge[0]) * across + (p % grid[1] >= edge[1]) for p in range(tokens)]
    for image, tile in product(range(2), set(tile_of)):
        inside = [p for p in range(tokens) if tile_of[p] == tile]
        rows = [k for k in range(keep) if tile_of[destinations[image, k]] == tile]
        local = torch.tensor([[inside.index(destinations[image, k]) for k in rows]])
        alone = attend_to_destinations(local, record_of(x[image : image + 1, inside], (1, len(inside))), 0.3)
        torch.testing.assert_close(merged[image, rows], alone(x[image : image + 1, inside])[0])
        torch.testing.assert_close(back[image, inside], alone.unmerge(y[image : image + 1, rows], len(inside))[0])
        assert [rows[k] for k in alone.source(len(inside))[0]] == source[image, inside].tolist()


def test_toma_nears_the_unpatched_model_as_it_merges_less():
    """On the small trained model, in the middle of its steps: weights over all tokens left none of it as it was."""
    model = trained(DIT)
    orders = drawing_orders(4, 3)
    inputs = {"hidden_states": orders.noise, "timestep": torch.full((4,), 500), "class_labels": orders.labels}
    plain = run(model, inputs)
    error = {}
    for keep in (0.98, 0.9, 0.7, 0.5):
        tokenprune.patch(model, "toma", schedule={0: keep, 1: keep}, steps={})
        error[keep] = float((run(model, inputs) - plain).norm() / plain.norm())
    assert sorted(error.values()) == list(error.values())
    assert error[0.98] < 0.1


def test_merging_by_attention_and_back():
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(2))
    destinations = torch.tensor([[0, 4, 5], [1, 2, 8]])
    reduction = attend_to_destinations(destinations, record_of(x, (3, 3)), 0.3)
    y = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    merged, back = reduction(x), reduction.unmerge(y, 9)
    for b in range(2):
        unit = x[b] / x[b].norm(dim=1, keepdim=True)
        weights = [[0.0] * 9 for _ in range(3)]
        for i in range(9):
            e = [torch.exp(unit[d] @ unit[i] / 0.3).item() for d in destinations[b].tolist()]
            for k in range(3):
                weights[k][i] = e[k] / sum(e)
        rows = [[w / sum(row) for w in row] for row in weights]
        for k in range(3):
            torch.testing.assert_close(merged[b, k], sum(rows[k][i] * x[b, i] for i in range(9)))
        for i in range(9):
            column = sum(rows[k][i] for k in range(3))
            torch.testing.assert_close(back[b, i], sum(rows[k][i] / column * y[b, k] for k in range(3)))


def test_clear_groups_come_back_as_they_went():
    centres = torch.eye(4)[torch.tensor([0, 1, 1, 2, 3, 0, 2, 3, 3])]
    reduction = attend_to_destinations(torch.tensor([[0, 1, 3, 4]]), record_of(centres[None], (3, 3)), 0.02)
    torch.testing.assert_close(reduction.unmerge(reduction(centres[None]), 9)[0], centres)


def test_destinations_and_weights_hold_over_steps(monkeypatch):
    model, inputs = build("unet_sdxl")
    x = inputs(1, 16, 12)
    events = []
    spy = lambda name, f: lambda *args, **kwargs: events.append(name) or f(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(toma, "facility_destinations", spy("select", toma.facility_destinations))
    monkeypatch.setattr(toma.Tiles, "weigh", spy("weigh", toma.Tiles.weigh))
    stack = "mid_block.attentions.0"
    tokenprune.patch(model, "toma", schedule={stack: 0.5}, steps={}, select_every=4, weigh_every=2)
    run(model, {**x, "timestep": torch.tensor(5)})  # solves the budget
    told = []
    for _ in range(2):  # the second run begins anew
        for step in range(9):
            events.clear()
            latents = {**x, "sample": x["sample"] + step, "timestep": torch.tensor(990 - 10 * step)}
            run(model, latents)
            run(model, {**latents, "encoder_hidden_states": -x["encoder_hidden_states"]})  # guidance in two calls
            told.append(tuple(events))
        held = next(reversed(runs._THREAD.runs.values())).held
        assert set(held) == {(stack, 0), (stack, 1)}
        assert not torch.equal(held[stack, 0].tiles.weights, held[stack, 1].tiles.weights)
        run(model, {**x, "timestep": torch.tensor(5)})
    select, weigh, nothing = ("select",) * 2, ("weigh",) * 2, ()
    assert told == [select, nothing, weigh, nothing, select, nothing, weigh, nothing, select] * 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["unet_sd", "unet_sdxl", "dit", "pixart"])
def test_all_tokens_kept_change_no_bit_and_nothing_is_left(name, method):
    model, inputs = build(name)
    x = inputs(3, 16, 12) if name != "unet_sd" else inputs(3, 4, 3)
    traces = lambda: [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]  # noqa: E731
    plain, before = run(model, x), traces()
    tokenprune.patch(model, method, keep=1.0)
    assert torch.equal(run(model, x), plain)
    with pytest.raises(tokenprune.BudgetError) as told:
        tokenprune.patch(model, method, schedule={"none": 0.5})
    stacks = str(told.value).split("the model has ")[1].split(", ")
    tokenprune.patch(model, method, schedule=dict.fromkeys(stacks, 1.0))
    close = torch.equal if method != "todo" else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert close(run(model, x), plain)
    tokenprune.patch(model, method, schedule=dict.fromkeys(stacks, 0.5), steps={})
    patched = run(model, x)
    assert not torch.allclose(patched, plain)
    assert torch.equal(run(model, x), patched)
    report = tokenprune.report(model).to_dict()
    assert all(place["tokens_out"] == -(-place["tokens_in"] // 2) for place in report["places"])
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)
    assert traces() == before


@pytest.mark.parametrize("method", METHODS)
def test_a_flops_budget_is_met_as_counted_in_the_forward(method):
    model, inputs = build("pixart")
    x = inputs(2, 32, 24)
    tokenprune.patch(model, method, flops=0.9, steps={})
    run(model, x)
    report = tokenprune.report(model).to_dict()
    assert report["flops_ratio"] == pytest.approx(0.9, abs=0.02)
    assert method in {info.name for info in tokenprune.methods(model)}


def test_gradients_and_checkpointing_agree():
    for method in METHODS:
        model, inputs = build("dit")
        x = inputs(2, 16, 16)
        tokenprune.patch(model, method, schedule={0: 0.5})
        grads = []
        for checkpointing in (False, True):
            if checkpointing:
                model.enable_gradient_checkpointing()
            grads.append(gradients(model, [x])[0])
        torch.testing.assert_close(*grads)


def test_levels_are_named_and_what_cannot_be_is_refused():
    model, inputs = build("unet_sdxl")
    x = inputs(1, 16, 12)
    tokenprune.patch(model, "tomesd")
    run(model, x)
    report = tokenprune.report(model).to_dict()
    assert {place["tokens_in"] for place in report["places"]} == {48}
    assert report["skipped"]
    assert all("at levels of 48" in why for why in report["skipped"].values())
    tokenprune.patch(model, "tomesd", max_downsample=1)
    with pytest.raises(tokenprune.BudgetError, match="at levels of none"):
        run(model, x)
    tokenprune.patch(model, "tomesd", max_downsample=4)
    run(model, x)
    assert {place["tokens_in"] for place in tokenprune.report(model).to_dict()["places"]} == {48, 12}
    tokenprune.patch(model, "todo", factor=(2, 3))
    run(model, x)
    counts = {(p["tokens_in"], p["tokens_out"]) for p in tokenprune.report(model).to_dict()["places"]}
    assert counts == {(48, 12), (12, 2)}
    with pytest.raises(tokenprune.BudgetError, match=r"\(0, 0.75\]"):
        tokenprune.patch(model, "tomesd", ratio=0.9)
    with pytest.raises(tokenprune.BudgetError, match=r"keep=0\.25 or more"):
        tokenprune.patch(model, "tomesd", keep=0.1)
    with pytest.raises(tokenprune.BudgetError, match="one above 1"):
        tokenprune.patch(model, "todo", factor=1)
    for name, method in product(("flux", "sd3", "wan"), METHODS):
        with pytest.raises(tokenprune.UnsupportedMethod, match="can be applied nowhere"):
            tokenprune.patch(build(name)[0], method)


def test_an_option_that_is_a_budget_stands_alone():
    model, _ = build("unet_sd")
    for name, option in (("tomesd", {"ratio": 0.5}), ("toma", {"ratio": 0.5}), ("todo", {"factor": 2})):
        tokenprune.patch(model, name, **option)
        assert tokenprune.report(model).to_dict()["budget"] == "=".join(map(str, *option.items()))
        with pytest.raises(tokenprune.BudgetError, match="one budget at most"):
            tokenprune.patch(model, name, flops=0.9, **option)
    for name, option in (("tome", {"r": 4, "proportional": False}), ("top_k", {"rate": 0.7})):
        with pytest.raises(tokenprune.BudgetError, match="counts tokens that leave"):
            tokenprune.patch(model, name, **option)
