"""DynamicViT in training: masks, losses and gradients against loops, and the masked forward against one that drops."""

from __future__ import annotations

from dataclasses import replace

import naive_learned
import pytest
import tiny_models
import torch
from families import build, full_but, images
from learned_starts import by_place, random_parts
from learned_thresholds import in_training, left, patch_of
from torch import Tensor, nn
from torch.nn import functional as F

import tokenprune
from tokenprune.learned_parts import LearnedParts
from tokenprune.methods.dynamicvit import off_ratios
from tokenprune.training.distillation import Distillation
from tokenprune.training.taught import Taught


def learning(model: nn.Module, parts: LearnedParts, **budget: float) -> nn.Module:
    """The learned parts of the model, patched, with gradients; the model is frozen."""
    tokenprune.patch(model, weights=parts, **budget)
    model.requires_grad_(False)
    return tokenprune.learned(model).requires_grad_(True)


def noise(shapes: dict[int, tuple[int, ...]], seed: int) -> dict[int, Tensor]:
    """Gumbel noise as torch draws it for one place after the other."""
    torch.manual_seed(seed)
    return {block: -torch.empty(shape).exponential_().log() for block, shape in shapes.items()}


def test_masks_losses_and_gradients_are_those_of_the_loops() -> None:
    """Of two images, with the unpatched model as a teacher."""
    model, x, labels = tiny_models.build("class_token"), tiny_models.images(2), torch.tensor([3, 7])
    model.blocks = model.blocks[:3]
    parts = random_parts(model, "dynamicvit", flops=0.6)
    learned = {block: {k: v.clone().requires_grad_() for k, v in own.items()} for block, own in by_place(parts).items()}
    drawn = {block: extra.double() for block, extra in noise({0: (2, 35, 2), 1: (2, 35, 2)}, seed=5).items()}
    own = [
        naive_learned.masked_forward(model, image, learned, {block: extra[i] for block, extra in drawn.items()})
        for i, image in enumerate(x)
    ]
    teacher = [naive_learned.masked_forward(model, image, {}, {}) for image in x]
    module = learning(model, parts, flops=0.6)
    patch = patch_of(model)
    counts = patch.counts(35)
    places = [[masks[place] for _, _, masks in own] for place in range(2)]
    ratio = naive_learned.ratio_loss(places, [counts[block] / 35 for block in (0, 1)])
    expected = F.cross_entropy(torch.stack([logits for logits, _, _ in own]), labels, label_smoothing=0.1)
    student, given, kept = (
        [row for image in side for row in image]
        for side in zip(
            *(
                (mine[1][1:], other[1][1:], [mask.item() == 1 for mask in mine[2][1]])
                for mine, other in zip(own, teacher, strict=True)
            ),
            strict=True,
        )
    )
    assert 5 < sum(kept) < 60
    expected = expected + 0.25 * naive_learned.token_loss(student, given, kept)
    for mine, other in zip(own, teacher, strict=True):
        expected = expected + 0.5 * naive_learned.divergence(mine[0], other[0]) / 2
    expected = expected + ratio
    names = [f"{block}.{name}" for block, tensors in learned.items() for name in tensors]
    wanted = torch.autograd.grad(expected, [tensor for tensors in learned.values() for tensor in tensors.values()])

    taught = Taught(
        model,
        patch,
        last=model.blocks[-1],
        width=48,
        flops=0.6,
        smoothing=0.1,
        distill=Distillation(0.5, 0.25),
        across=lambda one: one,
    )
    torch.manual_seed(5)
    loss, told = taught(x, labels)
    assert patch.lesson is not None
    for place, block in enumerate((0, 1)):
        assert patch.lesson.alive[block].tolist() == [[mask.item() for mask in image] for image in places[place]]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert told[1].item() == pytest.approx(ratio.item(), rel=1e-5)
    assert told[2].item() == pytest.approx(sum(kept) / 70)
    found = dict(zip(names, torch.autograd.grad(loss, [module.get_parameter(name) for name in names]), strict=True))
    scale = max(one.abs().max().item() for one in wanted)
    assert scale > 1e-2
    for name, one in zip(names, wanted, strict=True):
        torch.testing.assert_close(found[name].double(), one, rtol=2e-3, atol=2e-5 * scale)


def decided(model: nn.Module, seed: int = 0) -> LearnedParts:
    """Predictors whose decisions no noise turns."""
    parts = random_parts(model, "dynamicvit", seed, flops=0.75)
    for name, tensor in parts.tensors.items():
        if ".last." in name:
            tensor.mul_(1e5 if name.endswith("weight") else 0.0)
    return parts


TOKEN = ("class_token", "distilled", "registers")


@pytest.mark.parametrize("family", full_but(("class_token", "registers"), TOKEN))
def test_masked_is_dropped(family: str) -> None:
    """Where as many tokens leave as the predictors would rather drop."""
    model = build(family)
    x, compared = images(model, 1), 0
    for seed in range(40):
        parts = decided(model, seed)
        tokenprune.patch(model, weights=parts, flops=0.75)
        with torch.no_grad(), in_training(model) as lesson:
            masked = model(x)
        blocks = sorted(lesson.alive)
        counts = [35, *(int(lesson.alive[block].sum()) for block in blocks)]
        if not counts[0] > counts[1] > counts[-1] > 1:
            continue
        shares = {block: counts[place + 1] / counts[place] for place, block in enumerate(blocks)}
        tokenprune.patch(model, weights=parts, schedule=shares)
        kept = [lesson.alive[block][0].nonzero().flatten().tolist() for block in blocks]
        assert left(model, x)[0] == kept
        with torch.no_grad():
            torch.testing.assert_close(masked, model(x), rtol=1e-4, atol=1e-4)
        compared += 1
        if compared == 2:
            return
    raise AssertionError(f"{compared} seeds of 40 drop some tokens and keep some")


def test_an_image_of_which_nothing_would_be_left_keeps_what_it_had() -> None:
    model = build("class_token")
    x, parts = images(model, 2), decided(model)
    parts.tensors["1.last.bias"].copy_(torch.tensor([-1e9, 0.0]))
    tokenprune.patch(model, weights=parts, flops=0.75)
    with torch.no_grad(), in_training(model) as lesson:
        assert model(x).isfinite().all()
    assert torch.equal(lesson.alive[1], lesson.alive[0])
    assert (lesson.alive[1].sum(1) >= 1).all()
    assert (lesson.alive[2].sum(1) >= 1).all()


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model = build("class_token")
    x, found = images(model, 2), []
    parts = random_parts(model, "dynamicvit", flops=0.75)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        module = learning(model, replace(parts), flops=0.75)
        torch.manual_seed(3)
        with in_training(model) as lesson:
            lesson.leaving = patch_of(model).counts(35)
            (model.train()(x).square().mean() + off_ratios(lesson, 0.75)).backward()
        found.append([parameter.grad.clone() for parameter in module.parameters()])
        tokenprune.unpatch(model)
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-7)
