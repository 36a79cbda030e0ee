"""What an adapter says about a denoiser, and all that is known of it outside the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Arguments = dict[str, Any]
# (value of the argument, positions [B, K] of the computed tokens, all tokens N, text tokens T) -> the value for them.
Slice = Callable[[Any, Tensor, int, int], Any]
Remembers = Callable[[Iterable[nn.Module]], "str | None"]


@dataclass(frozen=True)
class CrossFacts:
    """The cross-attention of a block: modules that put out its queries and keys, its heads and scale, and the block's
    argument with the bias [B, 1, T] of its keys, None where it takes none. A module is None while a fused projection
    puts out its part with others."""

    queries: nn.Module | None
    keys: nn.Module | None
    heads: int
    scale: float
    bias: str | None


@dataclass
class BlockFacts:
    """One block that image tokens pass through.

    module: the block. arguments: names of its forward's parameters in order. hidden: the one that holds the image
    tokens [B, N, C]; text: the one with the text tokens [B, T, C'], None where there is none that is concatenated.
    returned: where the image tokens are in the block's output, None where they are the output. slices: (argument, how
    its value is taken at the computed tokens) of all else that is indexed by token. queries, keys: modules that put out
    [B, N, H D], [B, N, H, D] or [B, H, N, D], None while a fused projection puts them out with others; heads, scale: of
    the attention. text_first: whether the text stands before the image where both come out. before: (block, its
    arguments) -> the same outputs, before the block has run, None where it cannot be said. rotate: (the block's
    arguments, image tokens) -> what the attention does to queries and keys [B, H, N, D] of the image tokens, None where
    nothing. cross: the cross-attention, if it has one. parts: modules that a method may run on fewer tokens than the
    block, their first argument the tokens: "attention", "cross", "mlp"; and "keys", the attention again where its keys
    and values may come from other tokens than its queries. fused: the attention -> whether it projects queries, keys
    and values at once now, so that they may not. swapped: the block's class with the site in front. context: modules
    that put out keys or values of its self-attentions [B, N, C'] (joint ones of text and image [B, T + N, C']), which
    may stand for more tokens than the queries do; empty where queries and keys must be of the same tokens. rotary: the
    argument with rows for both, which then has to fit either. attentions, mlp: parts whose output for all tokens can be
    kept from step to step, None where they are not modules of their own; expose: puts a site in front of such a part.
    """

    name: str
    module: nn.Module
    arguments: tuple[str, ...]
    hidden: str
    text: str | None
    returned: int | None
    slices: tuple[tuple[str, Slice], ...]
    queries: nn.Module | None
    keys: nn.Module | None
    heads: int
    scale: float
    text_first: bool
    before: Callable[[nn.Module, Arguments], tuple[Tensor, Tensor]] | None
    rotate: Callable[[Arguments, int], Callable[[Tensor], Tensor] | None]
    cross: CrossFacts | None
    parts: Mapping[str, nn.Module]
    fused: Callable[[nn.Module], bool]
    swapped: type[nn.Module]
    context: tuple[nn.Module, ...] = ()
    rotary: str | None = None
    attentions: tuple[nn.Module, ...] = ()
    mlp: nn.Module | None = None
    expose: Callable[[nn.Module], None] | None = None


@dataclass
class Stack:
    """Blocks in a row that share one set of computed tokens; behind the last all tokens are there again.

    edge: whether the step schedules' "edges" spare it: the first stack of a stage on the way down, the last of a stage
    on the way up, the first and the last of a mere row of blocks (AT-EDM's prune-less schedule).
    """

    name: str
    blocks: tuple[BlockFacts, ...]
    edge: bool = False


@dataclass
class DenoiserHost:
    """One denoiser.

    arguments: names of its forward's parameters in order. latents, timestep: of them, those. last_timestep: the
    timestep of pure noise (1000, or 1 where noise levels are given). shared: whether all images of a batch must
    compute the same tokens (a rotary table has no batch). convolves: whether what follows a stack mixes neighbouring
    tokens. divisible: whether a stack is a mere row of blocks that a method may divide. example: () -> keyword
    arguments of the usual forward on the meta device, None where they are not known. remembers: modules -> what on one
    of them gives outputs of an earlier step (a cache of the host's), None where nothing does. countable: makes a copy
    of the model run attentions that can be counted without values. channels: how many of the first channels of the
    input are the latents that are denoised, where others (a mask, the image to edit) may stand behind them.
    """

    model: nn.Module
    stacks: Sequence[Stack]
    arguments: tuple[str, ...]
    latents: str
    timestep: str
    last_timestep: float
    shared: bool
    convolves: bool
    remembers: Remembers
    divisible: bool = False
    countable: Callable[[nn.Module], None] | None = None
    example: Callable[[], Arguments] | None = None
    channels: int | None = None
    notes: list[str] = field(default_factory=list)
