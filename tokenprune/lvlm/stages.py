"""How many visual tokens leave the language model at each stage of a prompt, and where they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.budget import Budget
from tokenprune.errors import BudgetError, UnsupportedModel
from tokenprune.lvlm.inside import Inside
from tokenprune.lvlm.prefill import solve_final
from tokenprune.recording import Forward
from tokenprune.schedule import kept_count, largest_share

if TYPE_CHECKING:
    from tokenprune.lvlm.patch import LvlmPatch
    from tokenprune.lvlm.prompt import Image


def begin(patch: LvlmPatch, images: Sequence[Image], visual: Tensor, real: Tensor) -> Inside:
    """The state of a prompt's forward. visual, real: [B, L] which tokens are an image's, and none of padding.

    Raises:
        BudgetError: more tokens than there are, or none would leave.
    """
    recipe = patch.inside
    assert recipe is not None
    own = torch.zeros_like(visual)
    sure = sure_tokens(images, recipe.stride, visual) if recipe.stride is not None else None
    rates, finals, forwards = [], [], []
    for sample in range(len(visual)):
        mine = [image for image in images if image.sample == sample]
        for image in mine:
            own.view(-1)[image.flat] = True
        total = sum(len(image.flat) for image in mine)
        on_grid = int(sure[sample].sum()) if sure is not None else 0
        rate, final = _of_sample(patch, sample, total, len(mine), on_grid)
        rates.append(rate)
        finals.append(final)
        forwards.append(Forward(mine[0].grid if len(mine) == 1 else None))
    for recording in patch.recordings:
        recording.forwards += forwards
    patch.seen = tuple((len(image.flat), len(image.flat)) for image in images)
    forwards = forwards if patch.recordings else []
    return Inside([], 0, own, real, rates, finals, sure, patch.local.candidates, forwards=forwards)


def _of_sample(patch: LvlmPatch, sample: int, total: int, images: int, on_grid: int) -> tuple[float, int | None]:
    """(rate of each stage, tokens behind the last, None where the rate says it) of a prompt with `total` tokens."""
    budget, recipe = patch.budget, patch.inside
    assert recipe is not None
    if total == 0:
        return 1.0, 0
    if budget.kind == "flops":
        final = solve_final(patch, patch.local.prompts[sample], total, on_grid)
        return recipe.rate(final / total, total, on_grid), final
    if budget.kind not in ("keep", "tokens"):
        if all(recipe.kept(patch.share, stage, total, total) >= total for stage in range(len(patch.places))):
            raise _drops_none(budget, total)
        return patch.share, None
    final = int(budget.value) * images if budget.kind == "tokens" else kept_count(budget.value, total)
    if final > total:
        raise BudgetError(
            f"{budget} asked, but the prompt's {images} images have {total} visual tokens; use at most"
            f" tokens={total // images}"
        )
    if budget.kind == "keep" and final == total:
        raise _drops_none(budget, total)
    return recipe.rate(final / total, total, on_grid), final


def _drops_none(budget: Budget, total: int) -> BudgetError:
    return BudgetError(
        f"{budget} of {total} tokens drops none; use keep={largest_share(total):.3f} or less, or keep=1.0"
    )


def sure_tokens(images: Sequence[Image], stride: int, visual: Tensor) -> Tensor:
    """Bool [B, L]: every `stride`-th row and column of each image; of one without a grid, as many evenly spaced."""
    sure = torch.zeros(visual.numel(), dtype=torch.bool, device=visual.device)
    for image in images:
        tokens = torch.arange(len(image.flat), device=visual.device)
        if image.grid is not None:
            columns = image.grid[1]
            on_grid = (tokens // columns % stride == 0) & (tokens % columns % stride == 0)
        else:
            on_grid = tokens % (stride * stride) == 0
        sure[image.flat[on_grid]] = True
    return sure.view_as(visual)


def refuse_inside(text: Any, cache: Any, entries: int, deepstack: Sequence[Any] | None, places: Sequence[int]) -> None:
    """Raise where tokens cannot leave between layers of this call."""
    if getattr(cache, "is_compileable", False):
        raise UnsupportedModel(
            "layers of a static cache are equally long; use the dynamic one, or a method of the tower"
        )
    if entries:
        raise UnsupportedModel(
            "an image on top of a cache cannot lose tokens between layers; run the conversation anew, or use a method"
            " that works behind the tower, such as 'top_k'"
        )
    if text.training and getattr(text, "gradient_checkpointing", False):
        raise UnsupportedModel("gradient checkpointing runs layers anew that have lost tokens; switch it off")
    if deepstack is not None and places[0] < len(deepstack):
        raise UnsupportedModel(
            f"this model adds image features behind its first {len(deepstack)} layers; use places={len(deepstack)} or"
            " later"
        )
