"""Learned parts of methods that leave the same number of tokens in every image, with weights that matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenprune.budget import parse_budget
from tokenprune.finding import bare, find_models
from tokenprune.learned_parts import LearnedParts
from tokenprune.registry import make_method
from tokenprune.towers import untrained

FIXED = ("dynamicvit", "sit", "sinkhorn", "patch_merger")
MIXING = FIXED[1:]


def start(model: nn.Module, method: str, **budget: object) -> LearnedParts:
    """Those that a training for this budget starts with."""
    tower, family = find_models(model)[0]
    with bare(tower, family):
        host = family.adapter.host(tower)  # type: ignore[attr-defined]
        return untrained(host, family.adapter, make_method(method, {}), {}, parse_budget(**budget))  # type: ignore


def random_parts(model: nn.Module, method: str, seed: int = 0, **budget: object) -> LearnedParts:
    """The same, each tensor drawn so large that what is learned decides clearly."""
    found, generator = start(model, method, **budget), torch.Generator().manual_seed(seed)
    for name, tensor in found.tensors.items():
        kind = name.split(".", 1)[1]
        spread = 1.8 * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.4
        tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
        if kind == "norm.weight":
            tensor.add_(1.0)
        elif kind == "scale":
            tensor.fill_(2.5)
        elif kind == "queries":
            tensor.mul_(2.0)
        elif kind == "centres":
            tensor.div_(tensor.norm(dim=-1, keepdim=True))
    return found


def by_place(parts: LearnedParts) -> dict[int, dict[str, Tensor]]:
    """The tensors of each block, in float64, for an oracle."""
    places: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts.tensors.items():
        block, kind = name.split(".", 1)
        places.setdefault(int(block), {})[kind] = tensor.double()
    return places
