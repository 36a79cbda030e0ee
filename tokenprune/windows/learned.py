"""The learned parts of a patch of windows, one for each stage."""

from __future__ import annotations

import torch
from torch import nn

from tokenprune.errors import TokenPruneError
from tokenprune.learned_parts import LearnedParts, architecture, block_norms, chosen_parts
from tokenprune.learning import Shape
from tokenprune.method import Method
from tokenprune.windows.host import WindowsHost
from tokenprune.windows.patch import WindowsPatch


def untrained(host: WindowsHost, adapter: str, method: Method, seed: int) -> LearnedParts:
    """The learned parts of a method as a training starts with, the same for each seed."""
    stages = 1 + max(block.layout.stage for block in host.blocks)
    tensors = _made(host, method, stages, seed).state_dict()
    return LearnedParts(method.name, {}, tensors, architecture(host, adapter), block_norms(host))


def learned_by_stage(host: WindowsHost, patch: WindowsPatch, weights: object) -> nn.ModuleDict:
    """What `weights` names, see `tokenprune.learned_parts.chosen_parts`.

    Raises:
        UntrainedMethod: there are none for this model. TokenPruneError: they are of another.
    """
    flops = patch.budget.value if patch.budget.kind == "flops" else None
    stored = chosen_parts(host, patch.adapter, patch.method.name, flops, weights)
    parts = _made(host, patch.method, patch.stages, 0)
    try:
        parts.load_state_dict(dict(stored.tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise TokenPruneError(f"the learned parts do not fit the {patch.stages} stages here: {reason}") from error
    return parts


def _made(host: WindowsHost, method: Method, stages: int, seed: int) -> nn.ModuleDict:
    assert method.learned is not None
    widths = {block.layout.stage: block.width for block in reversed(host.blocks)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        parts = {str(stage): method.learned.part(Shape(widths[stage], stage, stages)) for stage in range(stages)}
    return nn.ModuleDict(parts).requires_grad_(False)
