"""The learned parts of the places of a patch: as they start, or with what was learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokenprune.budget import Budget
from tokenprune.errors import TokenPruneError, UntrainedMethod
from tokenprune.host import Host
from tokenprune.learned_parts import LearnedParts, chosen_parts, shipped_for
from tokenprune.learning import Shape
from tokenprune.method import Method
from tokenprune.patch import Patch


@dataclass(frozen=True)
class Untrained:
    """In the place of learned parts: those that a training starts with, the same for each seed."""

    seed: int = 0


def chosen(host: Host, adapter: str, patch: Patch, weights: object) -> LearnedParts | Untrained:
    """What `weights` names, as `tokenprune.learned_parts.chosen_parts`."""
    if isinstance(weights, Untrained):
        return weights
    return chosen_parts(host, adapter, patch.method.name, bound_to(patch.method, patch.budget), weights)


def bound_to(method: Method, budget: Budget) -> float | None:
    """The share of the multiply-adds that learned parts must be for, None where any will do."""
    bound = method.learned is not None and method.learned.bound
    return budget.value if budget.kind == "flops" and bound else None


def shipped_options(host: Host, adapter: str, method: Method, budget: Budget) -> Mapping[str, Any]:
    """Those of the shipped parts that the patch will have, none where none are shipped."""
    try:
        return shipped_for(host, adapter, method.name, bound_to(method, budget)).options
    except UntrainedMethod:
        return {}


def of_any_size(host: Host, patch: Patch) -> nn.ModuleDict:
    """Parts that can be asked for any number of tokens, to count what they cost."""
    return _made(host, patch, dict.fromkeys(patch.places, host.tokens), "meta")


def loaded(host: Host, patch: Patch, stored: LearnedParts | Untrained) -> nn.ModuleDict:
    """The learned parts of the places of a patch, by block.

    Raises:
        TokenPruneError: what is stored is of other places, or of another number of tokens.
    """
    counts = patch.solved.get(host.tokens, {})
    if isinstance(stored, Untrained):
        return _made(host, patch, counts, "cpu", stored.seed)
    parts = _made(host, patch, counts, "cpu")
    assert patch.method.learned is not None
    bound = patch.method.learned.bound
    try:
        parts.load_state_dict(
            {name: t for name, t in stored.tensors.items() if bound or name.split(".", 1)[0] in parts}
        )
    except RuntimeError as error:
        budget = stored.found.get("flops")
        advice = "" if budget is None else f" (they are for flops={budget:g})"
        raise TokenPruneError(
            f"the learned parts do not fit {patch.method.name} in the blocks {', '.join(parts)}{advice}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return parts


def _made(host: Host, patch: Patch, tokens: Mapping[int, int], device: str, seed: int = 0) -> nn.ModuleDict:
    """The parts of the places of a patch, for `tokens` leaving each, as they start."""
    learned = patch.method.learned
    assert learned is not None
    width, depth = host.blocks[0].width, len(host.blocks)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        parts = {p: learned.part(Shape(width, p, depth, tokens.get(p, 0))) for p in patch.places}
    return nn.ModuleDict({str(place): part for place, part in parts.items()}).requires_grad_(False)
