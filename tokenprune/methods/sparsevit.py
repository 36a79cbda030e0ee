"""SparseViT: of Swin's windows those of little activation are passed through (Chen et al., "SparseViT: Revisiting
Activation Sparsity for Efficient High-Resolution Vision Transformer", CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import is_number
from tokenprune.errors import BudgetError
from tokenprune.learning import Recipe
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.selection.top_k import keep_top_k

# Of Swin-T's four stages, one ratio for each pair of blocks: the 1.4 times faster of the published models.
SWIN_T = ((0.6,), (0.0,), (0.2, 0.4, 0.5), (0.0,))

# Sparsity-aware adaptation as published; weight decay and batch are those with which Swin itself is tuned.
ADAPTATION = Recipe(epochs=12, batch_size=64, opt="adamw", weight_decay=0.05, model_rate=1e-5)


@dataclass(frozen=True)
class WindowRatios(Stages):
    """Shares of the windows left out, one for each stage, or for each pair of blocks of each stage in a row; None are
    those of Swin-T, in a stage of other depth at the same relative depth."""

    option: ClassVar[str] = "ratios"

    rate: float = 1.0
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.ratios is None:
            return
        if not self.ratios or not all(_is_share(ratio) for ratio in self.ratios):
            raise BudgetError(
                f"ratios={self.ratios!r} must be shares in [0, 1) of the windows that are left out, one for each stage"
                " or each pair of blocks; for example ratios=(0.6, 0.0, 0.4, 0.0)"
            )

    def of_blocks(self, depths: Sequence[int]) -> tuple[float, ...]:
        """The share left out in each block of stages with these numbers of blocks.

        Raises:
            BudgetError: there are more or fewer ratios than stages or pairs.
        """
        pairs = [-(-depth // 2) for depth in depths]
        if self.ratios is None:
            if len(depths) != len(SWIN_T):
                raise BudgetError(
                    f"published ratios are of models with {len(SWIN_T)} stages, and this one has {len(depths)}; use"
                    f" ratios=({', '.join(['0.4'] * len(depths))},), or keep= or flops="
                )
            in_pairs = [stage[p * len(stage) // n] for stage, n in zip(SWIN_T, pairs, strict=True) for p in range(n)]
        elif len(self.ratios) == sum(pairs):
            in_pairs = list(self.ratios)
        elif len(self.ratios) == len(depths):
            in_pairs = [ratio for ratio, n in zip(self.ratios, pairs, strict=True) for _ in range(n)]
        else:
            raise BudgetError(
                f"ratios={self.ratios!r} has {len(self.ratios)} entries; this model has {len(depths)} stages and"
                f" {sum(pairs)} pairs of blocks: give that many"
            )
        return _in_blocks(in_pairs, depths)


def _in_blocks(in_pairs: Sequence[float], depths: Sequence[int]) -> tuple[float, ...]:
    """Of each block what is that of its pair."""
    every, first = [], 0
    for depth in depths:
        every += [in_pairs[first + b // 2] for b in range(depth)]
        first += -(-depth // 2)
    return tuple(every)


def drawn_ratios(depths: Sequence[int], most: float) -> tuple[float, ...]:
    """Random shares left out in each block of a training step, from torch's generator: of each pair one of 0, 0.1, ...,
    `most`, evenly drawn, in a stage from the smallest to the largest (section 3.3)."""
    in_pairs: list[float] = []
    for depth in depths:
        drawn = torch.randint(_tenths(most) + 1, (-(-depth // 2),), device="cpu")
        in_pairs += (drawn.sort().values / 10).tolist()
    return _in_blocks(in_pairs, depths)


def _tenths(share: float) -> int:
    return int(share * 10 + 1e-6)  # rounded down: 0.96 rounded to 1.0 would leave no window


def _is_share(value: object) -> bool:
    return is_number(value) and 0.0 <= value < 1.0


@register_method("sparsevit")
def sparsevit(*, ratios: Sequence[float] | None = None, adapt: float | None = None) -> Method:
    """In each block compute the windows of most activation alone, attention and MLP, and pass the others through
    unchanged.

    A token counts the mean of its absolute channels in front of the first reduced block of its stage, a window the L2
    norm of its tokens. Blocks with shifted windows choose among theirs by the same tokens, and all blocks of a stage
    from the same ranking: one that computes fewer windows computes some of those.

    ratios: share of the windows left out, one for each stage or for each pair of blocks (W-MSA and SW-MSA), (0.6, 0.0,
    0.2, 0.4, 0.5, 0.0) for the published Swin-T, which is the default; windows left are rounded down. keep= and flops=
    compute the same share in every block.

    adapt: act in training forwards alone, each with random shares of up to this, 0.8 as published (sparsity-aware
    adaptation): weights that were trained on so are right for windows left out, at any shares. They are drawn from
    torch's own generator, as dropout is.
    """
    if adapt is not None and (not _is_share(adapt) or _tenths(adapt) < 1 or ratios is not None):
        raise BudgetError(
            f"adapt={adapt!r} is the largest share of the windows that a training step leaves out, in tenths, in place"
            " of ratios=; use adapt=0.8"
        )
    schedule = WindowRatios(ratios=None if ratios is None else _as_tuple(ratios))
    return Method(
        name="sparsevit",
        paper="Chen et al., SparseViT, CVPR 2023",
        schedule=schedule,
        score=mean_activation,
        select=keep_top_k,
        needs=frozenset({"windows"}),
        window_ratios=schedule.of_blocks,
        window_draw=None if adapt is None else partial(drawn_ratios, most=adapt),
        training_only=adapt is not None,
        tuning=None if adapt is None else ADAPTATION,
    )


def mean_activation(record: AttentionRecord) -> Tensor:
    """Mean over channels of |x| of each token, [B, n], in float32 at least."""
    x = record.hidden[:, record.num_prefix_tokens :]
    dtype = torch.promote_types(x.dtype, torch.float32)
    total: Tensor = torch.linalg.vector_norm(x, ord=1, dim=-1, dtype=dtype)
    return total / x.shape[-1]


def _as_tuple(ratios: object) -> tuple[float, ...]:
    if isinstance(ratios, (str, bytes)) or not isinstance(ratios, Sequence):
        raise BudgetError(f"ratios={ratios!r} must be a row of shares; for example ratios=(0.6, 0.0, 0.4, 0.0)")
    return tuple(ratios)
