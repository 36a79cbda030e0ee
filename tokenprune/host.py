"""Host: what an adapter says about a model, and all that the core knows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenprune.kernels.merge import gather
from tokenprune.tables import positions

# A tap says what to catch and where: "queries", "keys", "values" the output of a module, "inputs" and "value_inputs"
# the input of one.
Taps = tuple[tuple[str, nn.Module], ...]
# One tensor, or cosines and sines apart.
RopeTable = Tensor | tuple[Tensor, ...]
# The module whose input was caught and that input: a copy of a model runs modules of its own under the same hooks.
Caught = tuple[nn.Module, Tensor]


def heads_first(queries: Tensor | None, keys: Tensor | None, _: Caught | None) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys caught as [B, H, N, D]."""
    return queries, keys


def tokens_first(queries: Tensor | None, keys: Tensor | None, _: Caught | None) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys caught as [B, N, H, D]."""
    return (
        queries.transpose(1, 2) if queries is not None else None,
        keys.transpose(1, 2) if keys is not None else None,
    )


@dataclass(frozen=True, eq=False)
class Stretch:
    """Images of one size that lie side by side in a row. images: how many. grid: (rows, columns) of each. order: [n]
    the original patch, counted row by row, that each token of an image is."""

    images: int
    grid: tuple[int, int]
    order: Tensor

    @property
    def tokens(self) -> int:
        """Of each image, n."""
        return self.grid[0] * self.grid[1]


@dataclass
class BlockHost:
    """One block that tokens pass through.

    name: of the place in reports. module: the block. arguments: names of what it may be given by position behind the
    hidden states. taps: where queries and keys come by. read: turns what the taps
    caught (queries, keys, inputs) into queries and keys [B, H, N, D]. scale: multiplies q.k. key_bias: name of the
    block's argument that takes an additive bias of the attention logits, None where there is none (an attention that
    computes its own bias gets it through one of the swaps: `takes_bias` says whether either way exists).
    mask_argument: name of the caller's attention mask, under which nothing is reduced. bias_arguments: names of
    arguments of shape [B or 1, H, N, N] or [H, N, N] to be re-indexed. rope_argument: the rotary table's. rotate:
    (x [B, H, N, D], table) -> rotated. mid: the block's class with a reduction point between attention and MLP, or
    None and why not; width, check_tokens: channels and prunable tokens that the block can be tried on by itself;
    check_arguments: hidden states [1, N, C] -> what else it must then be given. swaps: (module, class) to be exchanged
    while the patch is on. front_swaps: further ones where the block is the last and only prefix tokens are read behind
    it: classes whose attentions take the queries of `tokenprune.here.front_here` alone (none: it attends from all
    tokens, and only the MLP runs on fewer). records: whether a forward hook on the block is the host's own, that hands
    the block's output on as one of the model's.

    For methods that keep a different number of tokens in each image:
    attentions: the modules that mix tokens. ragged_swaps: in the place of `swaps`, classes whose attentions go through
    `tokenprune.ragged_attention.attend_here` (empty: such methods are refused). values: (module, what a tap for values
    caught there) -> values [B, H, N, D]. rope_identity: rotary table [..., D] -> the row [D] that rotates nothing.
    intercepts: whether the attentions may run once on a packed sequence (found out when a model is patched).

    in_row: whether the block is given the tokens of all images in one row [T, C], with rotary tables [T, D], and an
    argument `lengths_argument` [segments + 1] that says where the segments of the row start that attend to themselves
    (`longest_argument`: the longest of them, or None).
    """

    name: str
    module: nn.Module
    arguments: tuple[str, ...] = ()
    taps: Taps = ()
    read: Callable[[Tensor | None, Tensor | None, Caught | None], tuple[Tensor | None, Tensor | None]] = heads_first
    scale: float = 1.0
    key_bias: str | None = None
    takes_bias: bool = False
    mask_argument: str | None = None
    bias_arguments: tuple[str, ...] = ()
    rope_argument: str | None = None
    rotate: Callable[[Tensor, Any], Tensor] | None = None
    mid: type[nn.Module] | None = None
    mid_refused: str = ""
    width: int = 0
    check_tokens: int = 4
    check_arguments: Callable[[Tensor], dict[str, Any]] | None = None
    records: Callable[[Callable[..., Any]], bool] | None = None
    swaps: tuple[tuple[nn.Module, type[nn.Module]], ...] = ()
    front_swaps: tuple[tuple[nn.Module, type[nn.Module]], ...] = ()
    ragged_swaps: tuple[tuple[nn.Module, type[nn.Module]], ...] = ()
    attentions: tuple[nn.Module, ...] = ()
    values: Callable[[nn.Module, Tensor], Tensor] | None = None
    rope_identity: Callable[[Tensor], Tensor] | None = None
    intercepts: bool = False
    in_row: bool = False
    lengths_argument: str = ""
    longest_argument: str = ""


@dataclass
class Host:
    """One model: blocks in order, the tokens of the model's usual input, and what its outputs need.

    num_prefix_tokens: tokens in front that are never dropped. tokens: prunable tokens at the usual input. grid: (rows,
    columns) of them. example: () -> the usual input of one image, on the model's device (several
    arguments: a dictionary of them). grid_of: (model, then what
    its forward is called with) -> grid of that input, or None where it has none. restored: (model, whether tokens are
    merged, the forward's keyword arguments) -> the blocks behind which that forward reads the patch tokens as the full
    grid (None: never any). prefix_tail: model -> the modules that the last block's output passes, those of the block
    included, where nothing but its prefix tokens is read in a forward; None where more is (None instead of a function:
    always). refused: (model, whether the method adds a bias, then what its forward is called with) -> why tokens cannot
    be reduced in that forward, empty where they can. swaps: as in BlockHost. ragged_head: whether the model's tail
    reads the full grid or goes through `tokenprune.ragged_blocks.head_by_length`. row: of a model whose images lie in
    one row (`BlockHost.in_row`), (model, then what its forward is called with) -> how they lie there.
    """

    model: nn.Module
    blocks: Sequence[BlockHost]
    num_prefix_tokens: int
    tokens: int
    grid: tuple[int, int]
    example: Callable[[], Any]
    grid_of: Callable[..., tuple[int, int] | None] | None = None
    restored: Callable[[nn.Module, bool, dict[str, Any]], tuple[int, ...]] | None = None
    prefix_tail: Callable[[nn.Module], Sequence[nn.Module] | None] | None = None
    refused: Callable[..., str] | None = None
    has_class_token: bool = True
    ragged_head: bool = False
    row: Callable[..., tuple[Stretch, ...]] | None = None
    swaps: tuple[tuple[nn.Module, type[nn.Module]], ...] = ()
    notes: list[str] = field(default_factory=list)


class Adapter(Protocol):
    """The only code that knows a library."""

    name: str

    def find(self, target: object) -> nn.Module | None:
        """The model of this adapter's family that is `target` or inside it, or None."""

    def host(self, model: nn.Module) -> Host:
        """The facts.

        Raises:
            UnsupportedModel: a part is not recognised.
        """


def gather_rope(table: RopeTable, origin: Tensor) -> RopeTable:
    """Rotary rows of the tokens that are left, for each image.

    table: [N, D], [H, N, D] or [B, 1 or H, N, D] over the full grid, or several; origin: [B, n]. Returns
    [B, 1 or H, n, D], or as many.
    """
    if isinstance(table, tuple):
        return tuple(_gather_rows(part, origin) for part in table)
    return _gather_rows(table, origin)


def _gather_rows(table: Tensor, origin: Tensor) -> Tensor:
    if table.ndim == 2:
        return gather(table.unsqueeze(0), origin).unsqueeze(1)
    return gather(table if table.ndim == 4 else table.unsqueeze(0), origin, dim=2)


def gather_bias(bias: Tensor, origin: Tensor, num_prefix_tokens: int) -> Tensor:
    """Rows and columns of an attention bias for the tokens that are left.

    bias: [B or 1, H or 1, N, N] (N, or 1 for rows, over prefix and full grid); origin: [B, n]. Returns
    [B, H, P + n, P + n].
    """
    prefix = positions(num_prefix_tokens, origin).expand(origin.shape[0], -1)
    index = torch.cat([prefix, origin + num_prefix_tokens], 1)
    if bias.shape[-2] > 1:
        bias = gather(bias, index, dim=2)
    return gather(bias, index, dim=3)
