"""A patched forward whose operations all run in Triton gives the tokens and the output of the eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build, images, options, run
from kernel_inputs import INTERPRETED, TRITON_DEVICE

import tokenprune
from tokenprune.kernels import backends
from tokenprune.kernels.backends import use_backend

OPERATIONS = {
    "top_k": {"class_attention", "gather"},
    "tome": {"cosine_match", "gather", "merge"},
    "zero_tprune": {"attention_mass", "cosine_match", "gather"},
    "evit": {"class_attention", "gather"},
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(operation, backend) of everything that ran."""
    seen: set[tuple[str, str]] = set()

    def note(operation: str, choice: backends.Choice) -> None:
        seen.add((operation, choice.backend))

    for name in ("attention_mass", "class_attention", "matching", "merge"):
        monkeypatch.setattr(f"tokenprune.kernels.{name}.log_once", note)
    return seen


FAST = [("class_token", method) for method in ("top_k", "tome", "zero_tprune")]
PAIRS = [(family, method) for family in ("class_token", "rotary_registers", "bias_own_table") for method in OPERATIONS]


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*p, marks=pytest.mark.full if INTERPRETED and p not in FAST else []) for p in PAIRS],
)
def test_a_forward(family: str, method: str, ran: set[tuple[str, str]]) -> None:
    model = tokenprune.patch(build(family).to(TRITON_DEVICE), method, keep=0.5, **options(family, method))
    x = images(model).to(TRITON_DEVICE)
    found: dict[str, Any] = {}
    for backend in ("eager", "triton"):
        ran.clear()
        with use_backend(backend), tokenprune.record(model) as recording:
            found[backend] = run(model, x), model.forward_features(x).detach(), recording
        if family == "class_token":  # without one, attention is scored as what all queries pay
            assert {name for name, _ in ran} == OPERATIONS[method]
        assert backend == "eager" or {how for _, how in ran} == {"triton"}
    (plain, features, before), (output, own_features, after) = found["eager"], found["triton"]
    places = [[place for forward in recording.forwards for place in forward.places] for recording in (before, after)]
    assert places[0]
    for ours, theirs in zip(*places, strict=True):
        assert torch.equal(ours.kept, theirs.kept)
        assert torch.equal(ours.source, theirs.source)
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own_features, features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [pytest.param("top_k", marks=pytest.mark.full if INTERPRETED else []), "tome"])
def test_training(method: str) -> None:
    gradients = []
    for backend in ("eager", "triton"):
        model = tokenprune.patch(build("class_token").to(TRITON_DEVICE), method, keep=0.5)
        with use_backend(backend):
            model.train()(images(model).to(TRITON_DEVICE)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
