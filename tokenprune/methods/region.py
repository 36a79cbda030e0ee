"""Only the region under a mask is computed: the training-free analogue of LazyDiffusion (Nitzan et al., "Lazy Diffusion
Transformer for Interactive Image Editing", ECCV 2024)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import is_number
from tokenprune.denoisers.over_steps import Level, Memory, OverSteps, at_steps
from tokenprune.errors import BudgetError, UnsupportedMethod
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.selection.top_k import keep_top_k

EARLY = (0, 0.04, 0.08, 0.12, 0.18, 0.36)
"""Shares of a run at which everything is computed: 6 of 50 steps, the early ones, in which the picture takes shape. Of
as many they came closest to the full computation (docs/diffusion-quality.md)."""


@register_method("region")
def region(*, mask: Tensor | None = None, ring: int = 1, dense_steps: tuple[float, ...] = EARLY) -> Method:
    """Compute only the tokens under an inpainting mask and a ring around them; the others keep their keys and values.

    Everything is computed at `dense_steps`, numbers of a run's steps or shares of it (0.1: number 5 of 50), of which
    the first is always one; the default are early ones, (0,) is the fastest. Where no pipeline is patched, a run counts
    as one of 50 steps. At the other steps the tokens under the mask attend to fresh keys and values of their own and to
    those that the rest had at the last dense step. The prediction outside is the one of that step (in a U-Net what its
    convolutions make of it): meant for inpainting, where the pipeline overwrites the latents outside the mask.

    mask: [H, W] (or [1, H, W], [1, 1, H, W]) of the image or its latents, above 0.5 what is to be computed. ring:
    tokens around it that are computed too, of each stack's own grid.
    """
    if not (is_number(ring) and ring >= 0 and ring == int(ring)):
        raise UnsupportedMethod(f"ring is a number of tokens around the mask, 0 or more, got {ring!r}")
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedMethod(
            f"mask is a tensor [H, W], got {type(mask).__name__}; for example torch.as_tensor(numpy.array(image)) > 127"
        )
    marked = Region(None if mask is None else _plane(mask), ring)
    return Method(
        name="region",
        paper="training-free, after Nitzan et al., LazyDiffusion, ECCV 2024",
        schedule=Stages(1.0),
        select=keep_top_k,
        needs=frozenset({"steps"}),
        stack_depth=1 << 30,
        recover="residual",
        over_steps=OverSteps(
            reuses="tokens",
            dense=at_steps(dense_steps),
            score=marked.score,
            count=marked.count,
            fixed=True,
            lacks=None if mask is not None else "region computes what a mask says: patch(pipe, 'region', mask=mask)",
        ),
    )


def token_mask(mask: Tensor, grid: tuple[int, int], ring: int) -> Tensor:
    """Tokens (bool [rows, columns]) any part of which lies under a mask (bool [H, W]), and `ring` more around them."""
    cells = functional.adaptive_max_pool2d(mask.float()[None, None], grid)
    if ring:
        cells = functional.max_pool2d(cells, 2 * ring + 1, 1, ring)
    return cells[0, 0] > 0


def token_grid(mask: Tensor, tokens: int) -> tuple[int, int]:
    """(rows, columns) of a grid of `tokens` with the sides of a mask [H, W].

    Raises:
        BudgetError: there is none.
    """
    high, wide = mask.shape
    rows = round((tokens * high / wide) ** 0.5)
    if rows == 0 or tokens % rows or abs(rows * wide - (tokens // rows) * high) >= max(high, wide):
        raise BudgetError(f"a mask of {high} x {wide} does not fit {tokens} tokens; give the mask of the whole image")
    return rows, tokens // rows


def _plane(mask: Tensor) -> Tensor:
    plane = mask.detach().cpu() > 0.5
    while plane.ndim > 2 and plane.shape[0] == 1:
        plane = plane[0]
    if plane.ndim != 2:
        raise BudgetError(
            f"mask must be one [H, W] for the whole batch, got {list(mask.shape)}; edit images with different masks one"
            " by one"
        )
    if not plane.any():
        raise BudgetError("mask is empty: it must be above 0.5 where the image is to be computed")
    return plane


class Region:
    """A mask [H, W] and, worked out once for each grid, which tokens are to be computed and how many."""

    def __init__(self, plane: Tensor | None, ring: int) -> None:
        self.plane = plane
        self.ring = ring
        self.grids: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def count(self, level: Level) -> int:
        """See `OverSteps.count`."""
        return self._of(level.grid, level.tokens)[1]

    def score(self, record: AttentionRecord, memory: Memory) -> Tensor:
        """1 for the tokens to compute, 0 for the others, [B, n]; the same of all images."""
        cells = self._of(record.grid, record.tokens)[0]
        return cells.to(record.hidden.device).expand(record.origin.shape[0], -1)

    def _of(self, grid: tuple[int, int] | None, tokens: int) -> tuple[Tensor, int]:
        assert self.plane is not None
        grid = grid or token_grid(self.plane, tokens)
        if grid not in self.grids:
            cells = token_mask(self.plane, grid, self.ring)
            self.grids[grid] = cells.flatten().float(), int(cells.sum())
        return self.grids[grid]
