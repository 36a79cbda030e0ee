"""Tiles: the (image, head) pairs that the eager paths take at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.kernels.inputs import BINARY, additive

LARGEST = 62.0
"""Of a logit that may be exponentiated as it is: a weight of 1e-5 over the sum of those of a million keys is not yet a
denormal number of float32, which would lose digits, or count as 0 (torch.set_flush_denormal)."""


@dataclass(frozen=True)
class Tile:
    """n pairs, some heads of one image or all heads of some images: q [n, M, D], k [n, columns, D], of which the first
    `keys` are keys and the rest zeros. pairs: their places among those of all images."""

    images: slice
    heads: slice
    pairs: slice
    q: Tensor
    k: Tensor
    keys: int
    bias: Tensor | None
    scale: float

    def attention(self, rows: slice, out: Tensor, log_sums: Tensor | None = None) -> Tensor:
        """These rows of A into `out` [n, rows, columns], zero in the columns behind the keys; the log-sum-exp of their
        logits into `log_sums` [n, rows]."""
        keys = self.keys
        # torch's softmax on a CPU may overwrite its input; of other devices that is not known.
        logits = out if out.device.type == "cpu" else torch.empty_like(out)
        # Padded columns too: a batched product into a slice would be a loop over the pairs.
        torch.baddbmm(logits, self.q[:, rows], self.k.transpose(1, 2), beta=0, alpha=self.scale, out=logits)
        if keys < logits.shape[2]:
            logits[..., keys:].fill_(float("-inf"))
        if self.bias is None:
            return _softmax(logits, out, log_sums)
        bias = additive(self.bias if self.bias.shape[2] == 1 else self.bias[:, :, rows])
        pairs = (self.images.stop - self.images.start, self.heads.stop - self.heads.start)
        logits.unflatten(0, pairs)[..., :keys].add_(bias)  # type: ignore[no-untyped-call]
        _softmax(logits, out, log_sums)
        # A query that may attend to nothing pays nothing.
        silent = bias.amax(-1, keepdim=True) == float("-inf")
        if out.device.type == "cpu" and not silent.any():  # which of other devices would be waited for
            return out
        out.unflatten(0, pairs).masked_fill_(silent, 0.0)  # type: ignore[no-untyped-call]
        if log_sums is not None:
            log_sums.unflatten(0, pairs).masked_fill_(silent.squeeze(-1), float("inf"))  # type: ignore[no-untyped-call]
        return out

    def exponentials(self) -> Exponentials | None:
        """A quicker way to A where no logit can be large, by the lengths of queries and keys."""
        if self.bias is not None or self.q.device.type != "cpu":
            return None
        longest = [torch.linalg.vector_norm(x, dim=-1).amax(-1) for x in (self.q, self.k)]
        if not bool((longest[0] * longest[1] * abs(self.scale) <= LARGEST).all()):
            return None
        return Exponentials(
            self.q,
            self.k.transpose(1, 2).clone(memory_format=torch.contiguous_format).mul_(self.scale * BINARY),
            self.keys,
        )


@dataclass(frozen=True)
class Exponentials:
    """A tile whose logits may be exponentiated as they are, without a pass for each row's largest and one to divide:
    q [n, M, D], k [n, D, columns] scaled to powers of two, of which the first `keys` are keys."""

    q: Tensor
    k: Tensor
    keys: int

    def of(self, rows: slice, out: Tensor) -> Tensor:
        """Those of these rows of logits into `out` [n, rows, columns], zero behind the keys; their sums [n, rows]."""
        torch.bmm(self.q[:, rows], self.k, out=out).exp2_()
        out[..., self.keys :] = 0.0
        return out.sum(-1)


def _softmax(logits: Tensor, out: Tensor, log_sums: Tensor | None) -> Tensor:
    if log_sums is None:
        return torch.softmax(logits, -1, out=out)
    largest = logits.amax(-1)
    torch.softmax(logits, -1, out=out)
    log_sums.copy_(largest - out.amax(-1).log())  # the largest of a row is 1 over its sum of exponentials
    return out


def tiles(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, pairs: int, columns: int, dtype: torch.dtype
) -> Iterator[Tile]:
    """Tiles of at most `pairs` pairs in `dtype`, cut the same way for every image, the keys filled up to `columns`."""
    batch, heads = q.shape[:2]
    if batch == 0:
        return
    images_at_once, heads_at_once = max(1, pairs // heads), min(pairs, heads)
    padded = None
    if k.shape[2] < columns:  # one for all tiles: of each the same columns are keys
        padded = k.new_zeros(images_at_once, heads_at_once, columns, k.shape[3], dtype=dtype)
    first = 0
    for image, some in enumerate(zip(q.split(images_at_once), k.split(images_at_once), strict=True)):  # type: ignore[no-untyped-call]
        images = slice(image * images_at_once, image * images_at_once + len(some[0]))
        for head, (queries, keys) in enumerate(zip(*(x.split(heads_at_once, 1) for x in some), strict=True)):
            part = slice(head * heads_at_once, head * heads_at_once + keys.shape[1])
            own = None
            if bias is not None:
                own = bias if bias.shape[0] == 1 else bias[images]
                own = own if bias.shape[1] == 1 else own[:, part]
            queries = queries.flatten(0, 1).to(dtype)
            if padded is not None:
                keys = _filled(padded, keys)
            last = first + len(queries)
            yield Tile(images, part, slice(first, last), queries, keys.flatten(0, 1).to(dtype), k.shape[2], own, scale)
            first = last


def flat(x: Tensor, images: slice, heads: slice, dtype: torch.dtype) -> Tensor:
    """A tile of x [B, H, ...] as [n, ...]; the heads of one image need no copy."""
    return x[images, heads].flatten(0, 1).to(dtype)


def _filled(padded: Tensor, k: Tensor) -> Tensor:
    """The part [b, h, columns, D] of `padded` with k [b, h, N, D] in front."""
    part = padded if k.shape[:2] == padded.shape[:2] else padded[: k.shape[0], : k.shape[1]]
    part.narrow(2, 0, k.shape[2]).copy_(k)
    return part
