"""Windows chosen by learned confidences: against loops, and what is promised of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import zoo
from naive_adawpt import blurred_tokens, guidance, logits_of, run_stage
from naive_windows import run_block, windows_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from windows_zoo import SIZES, build, hiera, images, sam

import tokenprune
from tokenprune.adapters.timm_hiera import TimmHiera
from tokenprune.adapters.timm_sam import TimmSam
from tokenprune.adapters.timm_swin import TimmSwin
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod, UntrainedMethod
from tokenprune.evals.deblur_swin import DeblurSwin
from tokenprune.family import active_patches
from tokenprune.learned_parts import LearnedParts
from tokenprune.methods import adawpt
from tokenprune.windows.learned import untrained
from tokenprune.windows.lesson import WindowLesson

torch.set_num_threads(1)
SIZE = (24, 40)


def network() -> nn.Module:
    """A small restoration network in float64, with discriminating weights, that takes any size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeblurSwin().eval()
    zoo.randomise(model, 5)
    return model.double()


def parts(model: nn.Module, threshold: float, family: str = "timm_swin", stages: int = 2) -> LearnedParts:
    """Random predictors of a model, its stages' widths read from their blocks."""
    tensors = {}
    generator = torch.Generator().manual_seed(3)
    for stage in range(stages):
        width = model.layers[stage].blocks[0].dim
        half = width // 2
        shapes = {"embed.weight": (half, width), "embed.bias": (half,), "norm.weight": (half,), "norm.bias": (half,)}
        shapes |= {"last.weight": (1, half), "last.bias": (1,)}
        for name, shape in shapes.items():
            tensors[f"{stage}.{name}"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[f"{stage}.last.bias"] *= 0
        tensors[f"{stage}.threshold"] = torch.tensor(threshold, dtype=torch.float64)
    width = model.layers[0].blocks[0].dim
    blocks = sum(len(stage.blocks) for stage in model.layers)
    found = {"family": family, "blocks": blocks, "width": width, "prefix_tokens": 0}
    return LearnedParts("adawpt", {}, tensors, found, (0.0,) * blocks, {"flops": 0.5})


def patched(model: nn.Module, threshold: float = 0.0, **budget: object) -> nn.Module:
    tokenprune.patch(model, "adawpt", weights=parts(model, threshold), **budget)
    tokenprune.learned(model).double()
    for stage, part in tokenprune.learned(model).items():  # loaded in single precision
        state = {n.split(".", 1)[1]: t for n, t in parts(model, threshold).tensors.items() if n.startswith(stage)}
        part.load_state_dict(state)
    return model


def of_stage(model: nn.Module, stage: int, threshold: float) -> dict[str, Tensor]:
    found = parts(model, threshold).tensors
    return {name.split(".", 1)[1]: tensor for name, tensor in found.items() if name.startswith(f"{stage}.")}


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(x)
    return output


def test_output_and_windows_are_those_of_the_loops() -> None:
    model, x = build("v1", SIZES[1]).double(), images(SIZES[1], 3).double()
    chosen: list[list[list[int]]] = []
    expected = []
    with torch.no_grad():
        for image in x:
            hidden, kept = model.patch_embed(image[None]), []
            for s, stage in enumerate(model.layers):
                grid, own = run_stage(stage.blocks, stage.downsample(hidden)[0], of_stage(model, s, 0.1))
                hidden, kept = grid[None], kept + own
            expected.append(model.head(model.norm(hidden)))
            chosen.append(kept)
    counts = [[len(block) for block in image] for image in chosen]
    assert len({tuple(image) for image in counts}) == 3
    patched(model, 0.1)
    with tokenprune.record(model) as recording:
        got = run(model, x)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-9, atol=1e-9)
    places = tokenprune.report(model).to_dict()["places"]
    for number, place in enumerate(places):
        left = [image[number] for image in counts]
        assert (place["fewest"], place["most"]) == (min(left), max(left))
        assert place["windows_out"] == round(sum(left) / 3, 1)
    for number, place in enumerate(recording.forwards[0].places):
        stage, block = (int(part) for part in place.name.split(".")[1::2])
        module = model.layers[stage].blocks[block]
        windows = windows_of(*place.grid, tuple(module.window_size), tuple(module.shift_size))
        for image, kept in enumerate(chosen):
            tokens = sorted(t for w in kept[number] for t in windows[w] if t is not None)
            assert (place.source[image] >= 0).nonzero().flatten().tolist() == tokens


def test_what_a_stage_has_left_out_stays_out_in_a_later_one_of_the_same_resolution() -> None:
    model, x = network(), images(SIZE, 3).double().abs().clamp(0, 1)
    learned = {stage: of_stage(model, stage, threshold) for stage, threshold in ((0, 0.1), (1, -0.1))}
    chosen, expected, alone = [], [], []
    with torch.no_grad():
        for image in x:
            first = model.patch_embed(image[None])[0]
            grid, kept = run_stage(model.layers[0].blocks, first, learned[0])
            before = dict(zip(((0, 0), (2, 2)), kept, strict=True))
            alone += run_stage(model.layers[1].blocks, grid, learned[1])[1]
            grid, later = run_stage(model.layers[1].blocks, grid, learned[1], before)
            chosen.append(kept + later)
            added = grid - first
            tokens = model.head(torch.cat([added, model.weigh(added) * first], -1))
            expected.append(image + nn.functional.pixel_shuffle(tokens.permute(2, 0, 1), 2))
    narrowed = [block for image in chosen for block in image[2:]]
    assert any(set(own) - set(block) for own, block in zip(alone, narrowed, strict=True))  # it would have taken more
    assert any(len(image[2]) < len(image[0]) for image in chosen)  # and takes fewer than it may
    patched(model, 0.0)
    for stage, threshold in (("0", 0.1), ("1", -0.1)):
        tokenprune.learned(model)[stage].threshold.fill_(threshold)
    got = run(model, x)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-9)
    places = tokenprune.report(model).to_dict()["places"]
    for number, place in enumerate(places):
        left = [len(image[number]) for image in chosen]
        assert (place["fewest"], place["most"]) == (min(left), max(left))


def test_no_window_all_windows_and_an_image_without_any() -> None:
    model, x = network(), images(SIZE, 3).double().abs().clamp(0, 1)
    dense = run(model, x)
    assert (dense - x).abs().amin(dim=(1, 2, 3)).max() < (dense - x).abs().max()
    assert torch.equal(run(patched(model, -1e6), x), dense)
    assert tokenprune.report(model).to_dict()["flops_ratio"] > 1  # scoring is counted
    assert torch.equal(run(patched(model, 1e6), x), x)
    assert {place["windows_out"] for place in tokenprune.report(model).to_dict()["places"]} == {0}
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), dense)


def test_an_image_does_not_depend_on_its_batch_and_others_pass_through() -> None:
    model, x = patched(network()), images(SIZE, 3).double()
    entered, left = {}, {}
    for name, module in model.named_modules():
        if name.count(".") == 3 and name.endswith(("blocks.0", "blocks.1")):
            module.register_forward_pre_hook(lambda m, args, name=name: entered.update({name: args[0].clone()}))
            module.register_forward_hook(lambda m, args, out, name=name: left.update({name: out.clone()}))
    with tokenprune.record(model) as recording:
        together = run(model, x)
    for place in recording.forwards[0].places:
        if place.name in entered:
            before, after, computed = entered[place.name], left[place.name], place.source >= 0
            assert torch.equal(before.flatten(1, 2)[~computed], after.flatten(1, 2)[~computed])
            assert (before.flatten(1, 2)[computed] != after.flatten(1, 2)[computed]).any(-1).all()
    alone = torch.cat([run(model, one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_copies_have_what_was_learned() -> None:
    model, x = patched(network()), images(SIZE, 2).double()
    expected = run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tokenprune.unpatch(model)
        assert torch.equal(run(other, x), expected)
        assert not torch.equal(run(tokenprune.unpatch(other), x), expected)


def test_what_a_forward_costs_is_what_torch_counts() -> None:
    model, x = network(), images(SIZE, 1).double()
    before = zoo.count(model, x).get_total_flops() // 2
    for threshold in (-0.3, 0.0, 0.3):
        counted = zoo.count(patched(model, threshold), x).get_total_flops() // 2
        data = tokenprune.report(model).to_dict()
        assert data["flops_before"] == before
        assert data["flops_after"] == counted
    assert 0 < data["flops_ratio"] < 1


def test_keep_bounds_what_an_image_computes() -> None:
    model, x = patched(network(), -1e6, keep=0.4), images(SIZE, 2).double()
    run(model, x)
    windows = [(p["windows_in"], p["most"], p["fewest"]) for p in tokenprune.report(model).to_dict()["places"]]
    assert windows == [(15, 6, 6)] * 6
    logits = logits_of(model.patch_embed(x[:1])[0].detach(), of_stage(model, 0, 0.0))
    with tokenprune.record(model) as recording:
        run(model, x[:1])
    means = [sum(logits[t] for t in window) / 16 for window in windows_of(12, 20, (4, 4), (0, 0))]
    best = sorted(range(15), key=lambda w: -means[w])[:6]
    tokens = sorted(t for w in best for t in windows_of(12, 20, (4, 4), (0, 0))[w])
    assert (recording.forwards[0].places[0].source[0] >= 0).nonzero().flatten().tolist() == tokens


def lesson_of(model: nn.Module, x: Tensor, mask: Tensor) -> tuple[WindowLesson, Tensor]:
    (patch,) = active_patches(model).values()
    patch.lesson = lesson = WindowLesson(mask, patch.share_of_cost)
    try:
        return lesson, model(x)
    finally:
        patch.lesson = None


def test_a_training_forward_is_that_of_the_windows_that_were_drawn() -> None:
    model, x = patched(network()), images(SIZE, 2).double()
    learned = tokenprune.learned(model).requires_grad_(True)
    torch.manual_seed(1)
    lesson, out = lesson_of(model, x, torch.zeros(2, *SIZE, dtype=torch.bool))
    with torch.no_grad():
        for image in range(2):
            first = grid = model.patch_embed(x[image : image + 1])[0]
            number = 0
            for stage in model.layers:
                for block in stage.blocks:
                    alive = lesson.alive[lesson.blocks[number]][image]
                    assert set(alive.tolist()) <= {0.0, 1.0}
                    grid = run_block(block, grid, [w for w, one in enumerate(alive.tolist()) if one == 1])
                    number += 1
            added = grid - first
            tokens = model.head(torch.cat([added, model.weigh(added) * first], -1))
            expected = x[image] + nn.functional.pixel_shuffle(tokens.permute(2, 0, 1), 2)
            torch.testing.assert_close(out[image], expected, rtol=1e-9, atol=1e-9)
    shares = [lesson.alive[lesson.blocks[number]].mean().item() for number in range(6)]
    assert len(lesson.alive) == 4  # two tilings of two stages
    assert len(set(shares)) > 2
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned.parameters() if p.numel() > 1)


def test_draws_are_as_likely_as_the_confidences_say() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([-2.0, 0.0, 1.0]).repeat(4000, 1)
    shares = adawpt.drawn(scores).mean(0)
    assert torch.allclose(shares, torch.sigmoid(scores[0]), atol=0.03)


def test_the_loss_is_that_of_the_loops() -> None:
    model, x = patched(network()), images(SIZE, 2).double()
    mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[0, 3:10, 9:17] = True
    mask[1, 23, 39] = True  # a single pixel, in the last window
    torch.manual_seed(2)
    lesson, _ = lesson_of(model, x, mask)
    lesson.gains = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    told, number = [], 0
    with torch.no_grad():
        for image in range(2):
            grid, blurred, number = model.patch_embed(x[image : image + 1])[0], blurred_tokens(mask[image], 2), 0
            gains = lesson.gains[image].unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3)).flatten().tolist()
            computed: list[list[float]] = []
            for s, stage in enumerate(model.layers):
                logits = logits_of(grid, of_stage(model, s, 0.0))
                for n, shift in enumerate(((0, 0), (2, 2))):
                    windows, before = windows_of(12, 20, (4, 4), shift), computed[n] if s else None
                    told.append(guidance(logits, windows, blurred, told=before, gains=gains))
                for block in stage.blocks:
                    alive = lesson.alive[lesson.blocks[number]][image].tolist()
                    computed.append(alive)
                    grid, number = run_block(block, grid, [w for w, one in enumerate(alive) if one]), number + 1
    width = 48
    block = 4 * width**2 + 2 * 16 * width + 4 * width**2
    outside = 3 * 36 * width + width**2 + 2 * width * 12
    scoring = 2 * (width * width // 2 + width // 2)
    shares = [lesson.alive[lesson.blocks[number]].mean().item() for number in range(6)]
    ratio = (outside + scoring + sum(shares) * block) / (outside + 6 * block)
    expected = sum(told) / len(told) + 10 * (ratio - 0.4) ** 2
    assert adawpt.guided(lesson, 0.4).item() == pytest.approx(expected, rel=1e-6)


def test_refusals() -> None:
    model = build()
    with pytest.raises(UntrainedMethod, match="has to learn"):
        tokenprune.patch(model, "adawpt", flops=0.5)
    with pytest.raises(BudgetError, match=r"flops=0\.5"):
        tokenprune.patch(model, "adawpt", flops=0.6, weights=parts(model, 0.0))
    with pytest.raises(TokenPruneError, match="architecture"):
        tokenprune.patch(network(), "adawpt", weights=parts(model, 0.0))
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    with pytest.raises(UnsupportedMethod, match="windows"):
        tokenprune.patch(vit, "adawpt", flops=0.5)
    assert not active_patches(model)


@pytest.mark.parametrize("name", ["v2", "sam", "hiera"])
def test_other_models_of_windows(name: str) -> None:
    """Each image by itself as in the batch, and with all windows the unpatched model."""
    model = {"sam": sam, "hiera": hiera}[name]() if name in ("sam", "hiera") else build(name).double()
    x = images({"sam": (44, 28), "hiera": (32, 48)}.get(name, SIZES[0]), 3).double()
    plain = run(model, x)
    adapter = {"sam": TimmSam, "hiera": TimmHiera}.get(name, TimmSwin)
    start = untrained(adapter.describe(model), adapter.name, adawpt.adawpt(), 4)
    ratios = []
    for threshold in (1e6, 0.0, -1e6):
        for key in start.tensors:
            if key.endswith("threshold"):
                start.tensors[key].fill_(threshold)
        tokenprune.patch(model, "adawpt", weights=start)
        together = run(model, x)
        ratios.append(tokenprune.report(model).to_dict()["flops_ratio"])
        alone = torch.cat([run(model, one[None]) for one in x])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    assert ratios[0] < ratios[2]
    torch.testing.assert_close(together, plain, rtol=1e-9, atol=1e-9)
