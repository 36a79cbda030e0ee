"""SiT, Sinkhorn and PatchMerger in training: the same outputs as in inference, with their gradients."""

from __future__ import annotations

import naive_learned
import pytest
import torch
from families import build, images
from learned_starts import MIXING, random_parts
from learned_thresholds import in_training
from torch import Tensor, nn

import tokenprune
from tokenprune.learning import Shape
from tokenprune.methods.sinkhorn import LEARNED, Centres, transport


def loss(model: nn.Module, x: Tensor) -> Tensor:
    with in_training(model):
        out: Tensor = model(x)
        return (out * torch.arange(out.shape[1], dtype=x.dtype)).square().mean() / 1e3


@pytest.mark.parametrize("method", MIXING)
def test_gradients_say_how_the_loss_changes(method: str) -> None:
    """Those of all places along a random direction, against a difference, in float64."""
    model = build("class_token")
    x = images(model, 2).double()
    tokenprune.patch(model, weights=random_parts(model, method, flops=0.75), flops=0.75)
    parts = tokenprune.learned(model.double()).double().requires_grad_(True)
    model.requires_grad_(False)
    with torch.no_grad():
        plain = model(x)
    with in_training(model):
        assert torch.equal(model(x).detach(), plain)
    parameters = list(parts.parameters())
    gradients = torch.autograd.grad(loss(model, x), parameters)
    generator = torch.Generator().manual_seed(1)
    for one in (None, *range(len(parameters))):  # all at once, and each by itself
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        directions = [d if one in (None, i) else torch.zeros_like(d) for i, d in enumerate(directions)]
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(sign * 1e-5 * d)
                sides.append(loss(model, x))
                for p, d in zip(parameters, directions, strict=True):
                    p.sub_(sign * 1e-5 * d)
        assert slope.item() == pytest.approx(((sides[0] - sides[1]) / 2e-5).item(), rel=1e-4, abs=1e-6)
        if one is None:
            assert abs(slope.item()) > 1e-2


def test_a_transport_gives_every_token_away_and_fills_every_centre() -> None:
    similarity = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few = 3 * similarity[:, :4]
    loops = torch.tensor([naive_learned.transport(image) for image in few.tolist()], dtype=torch.float64)
    torch.testing.assert_close(transport(few), loops)
    plan = transport(similarity, epsilon=0.5, iterations=60)
    torch.testing.assert_close(plan.sum(1), torch.ones(2, 7, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(2), torch.ones(2, 7, dtype=torch.float64))
    wide = transport(100 * similarity[:, :3], epsilon=1.0)
    assert wide.isfinite().all()
    torch.testing.assert_close(wide.sum(1), torch.ones(2, 7, dtype=torch.float64))


def test_centres_stay_of_unit_length() -> None:
    part = Centres(Shape(width=12, place=0, depth=4, tokens=5))
    with torch.no_grad():
        part.centres.mul_(torch.arange(1.0, 6.0)[:, None])
    assert LEARNED.settle is not None
    LEARNED.settle(part)
    torch.testing.assert_close(part.centres.norm(dim=-1), torch.ones(5))
