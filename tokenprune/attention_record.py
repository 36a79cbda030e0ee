"""AttentionRecord: what a method may look at when it scores the tokens of one block."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.inputs import mean_over_heads


@dataclass(frozen=True)
class CrossAttention:
    """Queries [B, H, N, D] of the image tokens and keys [B, H, T, D] of the text; bias: [B, 1, 1, T] or None."""

    queries: Tensor
    keys: Tensor
    scale: float
    bias: Tensor | None = None

    def attention(self) -> Tensor:
        """The map [B, H, N, T] in float32: texts are short."""
        logits = self.scale * (self.queries.float() @ self.keys.float().transpose(-2, -1))
        return (logits if self.bias is None else logits + self.bias.float()).softmax(-1)


@dataclass(frozen=True)
class AttentionRecord:
    """One block's view of its tokens, N = num_prefix_tokens + n of them, of which the last n are prunable.

    queries, keys: [B, H, N, D] after their norms and before rotary embedding (None where the host exposes none; with
    grouped queries keys have fewer heads). values: [B, H, N, D], only for a method that needs them. hidden: [B, N, C]
    at the place; before: [B, N, C] as they entered the block, only for a method that needs them. sizes: [B, n] original
    patches per token (None: one each). origin: [B, n] original patch of each token. grid: (rows, columns) of the
    original patches, None where they fill none (the host dropped some, or was given patches instead of images). bias:
    additive attention bias [B or 1, H, N, N] of the host, or None. scale: multiplies q.k. place: index of the place, of
    `depth`. cross: the block's cross-attention, only for a method that needs it. step: a whole number [] that tells one
    step of a denoising run from another. text: embeddings [B, T, C] of the text of a prompt. log_sums: where not None,
    a score that goes through whole rows of attention leaves the log-sum-exp of each row [B, H, N] in it, for what needs
    some of their entries again. peers: of a denoiser, the places that choose among as many tokens in the same forward,
    `place` among them; shared: see `once`. Both are empty elsewhere. alive: [B, n] one for a token and zero for what is
    none (any more), None where all are tokens; only for a method with a `mask` or one that is `padded`. learned: what
    it has learned for the place. first: of an image tower and of windows, the index of the first place of the patch.
    """

    hidden: Tensor
    origin: Tensor
    num_prefix_tokens: int
    place: int
    depth: int
    grid: tuple[int, int] | None
    has_class_token: bool = True
    scale: float = 1.0
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    sizes: Tensor | None = None
    bias: Tensor | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    cross: CrossAttention | None = None
    step: Tensor | None = None
    text: Tensor | None = None
    log_sums: list[Tensor] | None = None
    before: Tensor | None = None
    peers: tuple[int, ...] = ()
    shared: dict[Any, Any] | None = None
    alive: Tensor | None = None
    learned: nn.Module | None = None
    first: int = 0

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, worked out once for all records of the same step of a denoising run that ask for `key`: of
        nothing but shapes, `peers` and `step`."""
        if self.shared is None:
            return make()
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    @property
    def tokens(self) -> int:
        """Prunable tokens entering the place, n."""
        return self.origin.shape[1]

    @property
    def q(self) -> Tensor:
        """Queries [B, H, N, D] before rotary embedding.

        Raises:
            UnsupportedMethod: the host exposes no queries here.
        """
        if self.queries is None:
            raise UnsupportedMethod("this method scores by attention, and the block exposes no queries; try 'uniform'")
        return self.queries

    @property
    def k(self) -> Tensor:
        """Keys [B, H, N, D] before rotary embedding, heads repeated where queries are grouped.

        Raises:
            UnsupportedMethod: the host exposes no keys here.
        """
        if self.keys is None:
            raise UnsupportedMethod("this method compares keys, and the block exposes none; try 'uniform'")
        if self.queries is not None and self.queries.shape[1] != self.keys.shape[1]:
            return self.keys.repeat_interleave(self.queries.shape[1] // self.keys.shape[1], dim=1)
        return self.keys

    @property
    def v(self) -> Tensor:
        """Values [B, H, N, D].

        Raises:
            UnsupportedMethod: the host exposes no values here.
        """
        if self.values is None:
            raise UnsupportedMethod("this method weighs by values, and the block exposes none; try 'top_k'")
        return self.values

    @property
    def block_input(self) -> Tensor:
        """Hidden states [B, N, C] as they entered the block.

        Raises:
            UnsupportedMethod: they are not known here.
        """
        if self.before is None:
            raise UnsupportedMethod("this method compares what entered the block, which is not known here")
        return self.before

    @property
    def metric(self) -> Tensor:
        """Mean over heads of the keys of the prunable tokens, [B, n, D]: what similarity is measured on."""
        if self.keys is None:
            return self.hidden[:, self.num_prefix_tokens :]
        return mean_over_heads(self.keys[:, :, self.num_prefix_tokens :])

    def rotated(self) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, N, D] as the attention uses them, rotary embedding applied where the host has it."""
        if self.rotate is None:
            return self.q, self.k
        return self.rotate(self.q), self.rotate(self.k)
