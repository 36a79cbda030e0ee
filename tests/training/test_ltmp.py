"""LTMP: its training forward and gradients against loops, and the masked forward against the one that really drops."""

from __future__ import annotations

import naive_ltmp
import pytest
import tiny_models
import torch
from families import build, full_but, images
from learned_thresholds import in_training, left, parts, patch_of
from torch import nn
from torch.nn import functional as F

import tokenprune
from tokenprune.methods.ltmp import off_budget

MERGE, PRUNE = (0.75, 0.8, 0.8, 0.8), (0.002, 0.004, 0.006, 0.01)


def shallow(variant: str) -> nn.Module:
    model = tiny_models.build(variant)
    model.blocks = model.blocks[: len(MERGE)]
    return model


@pytest.mark.parametrize("variant", ["class_token", pytest.param("registers", marks=pytest.mark.full)])
def test_masks_logits_and_gradients_are_those_of_the_loops(variant: str) -> None:
    model, x, labels = shallow(variant), tiny_models.images(1), torch.tensor([3])
    given = [
        tuple(torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in pair)
        for pair in zip(MERGE, PRUNE, strict=True)
    ]
    logits, means, kept = naive_ltmp.run(model, x, given)
    counts = [len(place) for image in kept for place in image]
    assert max(counts) < 35
    assert len(set(counts)) == 4, counts
    tokens, width = 35 + model.num_prefix_tokens, 48
    shown = naive_ltmp.flops(means, tokens, width).detach()
    # The counted share is 0.7 in the test: the penalty has its value and the gradient of the formula.
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected = expected + 10 * (naive_ltmp.flops(means, tokens, width) + 0.7 - shown - 0.6) ** 2
    wanted = torch.autograd.grad(expected, [t for pair in given for t in pair])
    tokenprune.patch(model, weights=parts(model, MERGE, PRUNE))
    assert left(model, x) == kept
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), logits.detach(), rtol=1e-4, atol=1e-4)
    learned = patch_of(model).learned
    assert learned is not None
    learned.requires_grad_(True)
    with in_training(model, width) as lesson:
        out = model(x)
        torch.testing.assert_close(out.detach().double(), logits.detach(), rtol=1e-4, atol=1e-4)
        for got, mean in zip(lesson.kept(), means, strict=True):
            assert got.item() == pytest.approx(mean.item(), abs=1e-6)
        loss = F.cross_entropy(out, labels, label_smoothing=0.1) + off_budget(lesson, 0.6)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        found = torch.autograd.grad(loss, [t for part in learned.values() for t in (part.merge, part.prune)])
    scale = max(abs(one.item()) for one in wanted)
    assert sum(abs(one.item()) > 1e-3 * scale for one in wanted) == len(wanted)  # none is zero
    for got, one in zip(found, wanted, strict=True):
        assert got.item() == pytest.approx(one.item(), rel=2e-3, abs=1e-5 * scale)


@pytest.mark.parametrize(
    "family",
    full_but(
        ("class_token", "bias_own_table"),
        ("class_token", "rotary_registers", "bias_own_table", "distilled", "mean_pool", "parallel_scaling"),
    ),
)
def test_masked_is_dropped(family: str) -> None:
    """On every kind of host. Where patch tokens are pooled a dropped one is estimated, so there tokens only merge."""
    model = build(family)
    x = images(model, 4)
    pooled = model.global_pool == "avg"
    prune = [0.0] * 4 if pooled else [0.005, 0.01, 0.012, 0.015]
    tokenprune.patch(model, weights=parts(model, [0.4 if pooled else 0.6] * 4, prune))
    with torch.no_grad():
        dropped = model(x)
        counts = [tuple(map(len, image)) for image in left(model, x)]
        assert len(set(counts)) > 1, counts
        assert all(1 <= image[-1] < image[0] <= 35 for image in counts), counts
        with in_training(model) as lesson:
            masked = model(x)
        torch.testing.assert_close(masked, dropped, rtol=1e-4, atol=1e-4)
        assert [lesson.alive[3][i].sum().item() for i in range(4)] == [image[-1] for image in counts]
        torch.testing.assert_close(model(x), dropped, rtol=0, atol=0)
        alone = torch.cat([model(one[None]) for one in x])
        torch.testing.assert_close(alone, dropped, rtol=1e-4, atol=1e-5)


def test_an_image_of_which_nothing_is_left_keeps_a_token() -> None:
    model = build("class_token")
    x = images(model, 3)
    tokenprune.patch(model, weights=parts(model, [1.0] * 4, [0.02, 1.0, 0.0, 0.0]))
    with torch.no_grad():
        dropped, kept = model(x), left(model, x)
        assert [len(image[1]) for image in kept] == [1, 1, 1]
        assert [image[1][0] for image in kept] == [image[0][0] for image in kept]
        with in_training(model):
            torch.testing.assert_close(model(x), dropped, rtol=1e-4, atol=1e-5)


def test_a_bound_is_kept() -> None:
    model = build("class_token")
    x = images(model, 3)
    for budget, most in (({"keep": 0.5}, 18), ({"tokens": 9}, 9)):
        tokenprune.patch(model, "ltmp", weights=parts(model, [0.95] * 4, [0.0] * 4), **budget)
        assert all(1 <= len(image[-1]) <= most for image in left(model, x))
        assert max(len(image[-1]) for image in left(model, x)) > most // 2


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model = build("class_token")
    x = images(model, 2)
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        tokenprune.patch(model, weights=parts(model, [0.75, 0.8, 0.8, 0.85], [0.01, 0.02, 0.02, 0.02]))
        learned = patch_of(model).learned
        assert learned is not None
        learned.requires_grad_(True)
        with in_training(model) as lesson:
            (model.train()(x).square().mean() + off_budget(lesson, 0.6)).backward()
        found.append([parameter.grad.clone() for parameter in learned.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-7)
