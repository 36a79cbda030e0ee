"""The session of a training: what it starts with, and the model while it is trained, which is put back behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tokenprune.api import patched
from tokenprune.budget import parse_budget
from tokenprune.calibration import evaluating
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.evals.data import ImageData
from tokenprune.family import active_patches
from tokenprune.finding import bare, find_models
from tokenprune.learned_parts import LearnedParts, block_norms
from tokenprune.learning import Shape
from tokenprune.method import Method
from tokenprune.patch import Patch
from tokenprune.registry import make_method
from tokenprune.schedule import Layout
from tokenprune.towers import Towers, untrained
from tokenprune.training.budget import budget_of
from tokenprune.training.distillation import Distillation
from tokenprune.training.state import generators, set_generators


def start_of(
    model: nn.Module, method: str, flops: float, seed: int, distill: Distillation, own: float, options: dict[str, Any]
) -> LearnedParts:
    """The learned parts as they start. own: the learning rate of the model's own weights.

    Raises:
        TokenPruneError: the method cannot be trained on the model, for this budget, or with these losses.
    """
    recipe = make_method(method, options)
    option = recipe.schedule.option
    budget = parse_budget(flops=budget_of(recipe, flops).get("flops"), own=(option, options.get(option)))
    if budget.is_full:
        raise BudgetError(f"{budget} leaves nothing out, and {method} has nothing to learn; use flops=0.6")
    if distill and own == 0 and recipe.learned is not None and recipe.learned.detached:
        raise UnsupportedMethod(
            f"{method} learns from detached tokens, and a teacher of a frozen model would change nothing; leave"
            " distill_logits= and distill_tokens= out, or train the model as well (model_rate=1e-5)"
        )
    if distill.tokens and recipe.mask is None:
        raise UnsupportedMethod(
            f"distill_tokens={distill.tokens:g} compares tokens that are left with the same ones of the unpatched"
            f" model, where tokens are masked, and {method} masks none; distill_logits= works"
        )
    found = find_models(model)
    tower, family = found[0]
    if len(found) != 1 or not isinstance(family, Towers):
        raise UnsupportedModel(
            f"{method} is trained on an image tower with a classifier, not on {type(model).__name__}"
        )
    with bare(tower, family):
        host = family.adapter.host(tower)
        if recipe.learned is not None and recipe.learned.places is not None:
            learning = recipe.learned.places(Layout(len(host.blocks), host.num_prefix_tokens))
            budget = parse_budget(schedule=dict.fromkeys(learning, 1.0))
        return untrained(host, family.adapter, recipe, options, budget, seed)


def session_options(recipe: Method, options: dict[str, Any], flops: float, start: LearnedParts) -> dict[str, Any]:
    """What `patch` is told in a training: with the budget, or the blocks that learn where these are others."""
    if recipe.learned is None or recipe.learned.places is None:
        return {**options, **budget_of(recipe, flops)}
    return {**options, "places": None, "schedule": {int(name.split(".", 1)[0]): 1.0 for name in start.tensors}}


def accelerator_of(mixed_precision: str | None, accumulate: int) -> Any:
    """What runs the training, on one process or several.

    Raises:
        TokenPruneError: a library is missing, or the precision is unknown.
    """
    try:
        import accelerate
        import timm.optim  # noqa: F401
    except ImportError as error:
        raise TokenPruneError(f"training needs {error.name}: pip install 'tokenprune-torch[train]'") from error
    try:
        return accelerate.Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)
    except ValueError as error:  # an unknown precision, or another one than this process has begun with
        raise TokenPruneError(f"mixed_precision={mixed_precision!r}: {error}") from error


@contextmanager
def session(
    model: nn.Module,
    method: str,
    options: dict[str, Any],
    start: LearnedParts,
    data: ImageData,
    device: torch.device,
    seed: int,
    *,
    frozen: bool,
) -> Iterator[Patch]:
    """The model on `device`, `frozen` or not, in eval mode, patched with parts that take gradients, and the global
    generators seeded; all as it was behind it."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before, states = device_of(model), generators()
    model.to(device)
    try:
        with patched(model, method, weights=start, **options), evaluating(model):
            patch = next(one for one in active_patches(model).values() if isinstance(one, Patch))
            assert patch.learned is not None
            assert patch.method.learned is not None
            torch.manual_seed(seed)
            if patch.method.learned.trained is not None:
                patch.learned = _trained(patch.method.learned.trained, patch, int(start.architecture["width"]), data)
            if frozen:
                model.requires_grad_(False)
            patch.learned.to(device).requires_grad_(True)
            yield patch
    finally:
        set_generators(states)
        for parameter in learning:
            parameter.requires_grad_(True)
            if not frozen:
                parameter.grad = None
        model.to(before)


def _trained(make: Callable[[Shape], nn.Module], patch: Patch, width: int, data: ImageData) -> nn.ModuleDict:
    assert data.classes is not None
    labels = patch.tokens if data.dense else 1
    shapes = {p: Shape(width, p, patch.depth, classes=data.classes, labels=labels) for p in patch.places}
    return nn.ModuleDict({str(place): make(shape) for place, shape in shapes.items()})


def last_block(model: nn.Module, patch: Patch) -> nn.Module:
    """The last block."""
    return find_models(model)[0][0].get_submodule(patch.names[-1])


def norms_of(model: nn.Module) -> tuple[float, ...]:
    """`block_norms` of its blocks."""
    tower, family = find_models(model)[0]
    assert isinstance(family, Towers)
    with bare(tower, family):
        return block_norms(family.adapter.host(tower))


def device_of(model: nn.Module) -> torch.device:
    """That of its first parameter."""
    return next(model.parameters()).device
