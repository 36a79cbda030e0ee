"""Ragged batches: every image keeps a number of tokens of its own, and the images lie one behind another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from tokenprune.kernels.merge import gather


@dataclass(frozen=True)
class RaggedReduction:
    """Which of n tokens leave a place, a different number in every image, and what becomes of the others.

    target: [B, n] for each entering token the position of the one that stands for it: its own where it leaves, that of
    the token it is merged into, or -1 where it is dropped. Tokens leave in the order in which they entered.
    """

    target: Tensor


def keep_where(kept: Tensor) -> RaggedReduction:
    """Keep the tokens where `kept` [B, n] is true, drop the others."""
    return RaggedReduction(torch.where(kept, torch.arange(kept.shape[1], device=kept.device), -1))


@dataclass(frozen=True)
class Group:
    """Images of equal length that lie side by side in a pack: their rows, which images, how many tokens each has."""

    rows: slice
    images: tuple[int, ...]
    length: int

    def of(self, x: Tensor) -> Tensor:
        """The group's rows of x [T, ...], by image: [g, length, ...]."""
        return x[self.rows].reshape(len(self.images), self.length, *x.shape[1:])


@dataclass(frozen=True, eq=False)
class Pack:
    """A ragged batch of B images as one sequence of T tokens, the shorter images first.

    images: which of the batch each stretch is. lengths: its tokens, prefix included. origin: [T] original patch of
    each token, -1 for prefix tokens. sizes: [T] original patches in each (None: one each). by_channel: whether the
    model stores its tokens by channel, as a patch embedding without prefix tokens does: a sum over them runs in memory
    order, and its last bits would differ.
    """

    images: tuple[int, ...]
    lengths: tuple[int, ...]
    num_prefix_tokens: int
    origin: Tensor
    sizes: Tensor | None = None
    by_channel: bool = False

    @cached_property
    def groups(self) -> list[Group]:
        """The images by length, in order."""
        groups, first, start = [], 0, 0
        for length, same in itertools.groupby(self.lengths):
            count = sum(1 for _ in same)
            rows = slice(start, start + count * length)
            groups.append(Group(rows, self.images[first : first + count], length))
            first, start = first + count, rows.stop
        return groups

    @cached_property
    def starts(self) -> Tensor:
        """Where each stretch starts, and the end of the last: int32 [B + 1]."""
        starts = [0, *itertools.accumulate(self.lengths)]
        return torch.tensor(starts, dtype=torch.int32, device=self.origin.device)

    @cached_property
    def first_rows(self) -> Tensor:
        """Where each image starts, in the order of the batch: [B]."""
        starts = dict(zip(self.images, itertools.accumulate(self.lengths, initial=0), strict=False))
        rows = [starts[image] for image in range(len(starts))]
        return torch.tensor(rows, dtype=torch.long, device=self.origin.device)

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """Rows [B, longest] of each stretch, behind its end its first one, and which of them are its own."""
        first = self.starts[:-1, None].long()
        column = torch.arange(max(self.lengths, default=0), device=self.origin.device)
        own = column < self.starts.diff()[:, None]
        return torch.where(own, first + column, first), own

    def by_image(self, x: Tensor) -> list[Tensor]:
        """The stretches of x [T, ...], in the order of the batch."""
        stretches = dict(zip(self.images, torch.split(x, list(self.lengths)), strict=True)) if self.images else {}
        return [stretches[image] for image in range(len(stretches))]

    def counts(self) -> tuple[int, ...]:
        """Prunable tokens of each image, in the order of the batch."""
        lengths = dict(zip(self.images, self.lengths, strict=True))
        return tuple(lengths[image] - self.num_prefix_tokens for image in range(len(lengths)))

    def padded(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """x [T, ...] by image, in the order of the batch, [B, longest, ...], `fill` behind the last token of each."""
        if not self.images:
            return x.new_zeros(0, self.num_prefix_tokens + 1, *x.shape[1:])
        return pad_sequence(self.by_image(x), batch_first=True, padding_value=fill)


def pack_batch(origin: Tensor, sizes: Tensor | None, num_prefix_tokens: int, *, by_channel: bool = False) -> Pack:
    """A batch whose images have equally many tokens, with `origin` [B, n] and `sizes` [B, n], as a pack."""
    batch, tokens = origin.shape
    return Pack(
        images=tuple(range(batch)),
        lengths=(num_prefix_tokens + tokens,) * batch,
        num_prefix_tokens=num_prefix_tokens,
        origin=_with_prefix(origin, num_prefix_tokens, -1),
        sizes=None if sizes is None else _with_prefix(sizes, num_prefix_tokens, 1),
        by_channel=by_channel,
    )


def _with_prefix(table: Tensor, prefix: int, fill: int) -> Tensor:
    return torch.cat([table.new_full((table.shape[0], prefix), fill), table], 1).reshape(-1)


@dataclass(frozen=True, eq=False)
class Repacking:
    """From one pack to the next: through it every per-token tensor goes.

    rows: [T'] row of the old pack of each token that leaves. place: [T] row of the new pack of the token that stands
    for each old one, -1 where it was dropped.
    """

    before: Pack
    after: Pack
    rows: Tensor
    place: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, C] to [T', C]; merged groups are averages weighted by size."""
        if self.after.sizes is None:
            return gather(x.unsqueeze(0), self.rows.unsqueeze(0)).squeeze(0)
        weighted = x * _sizes(self.before).unsqueeze(-1)
        return (_summed(weighted, self.place, self.rows.shape[0]) / self.after.sizes.unsqueeze(-1)).to(x.dtype)

    def leaves(self) -> Tensor:
        """Which tokens of the old pack leave: [T]."""
        return torch.zeros_like(self.place, dtype=torch.bool).index_fill(0, self.rows, True)

    def follow(self, rows: Tensor) -> Tensor:
        """Rows [B, N] of the old pack, -1 for none, to rows of the new one."""
        return torch.where(rows < 0, -1, self.place[rows.clamp(min=0)])


def _sizes(pack: Pack) -> Tensor:
    return pack.sizes if pack.sizes is not None else torch.ones_like(pack.origin, dtype=torch.float32)


def _summed(x: Tensor, place: Tensor, count: int) -> Tensor:
    """Sums [count, ...] of the rows of x [T, ...] with the same place; what has none, -1, goes to a row more."""
    place = torch.where(place < 0, count, place)
    return x.new_zeros(count + 1, *x.shape[1:]).index_add(0, place, x)[:count]


def repack(before: Pack, reductions: Sequence[RaggedReduction], *, merges: bool) -> Repacking:
    """Carry out one reduction [g, n] for each group of a pack; an image that would keep nothing keeps its first token.

    merges: whether the sizes of merged tokens are followed. Synchronises with the host, as counts are needed there.
    """
    every = torch.arange(before.origin.shape[0], device=before.origin.device)
    pairs = zip(before.groups, reductions, strict=True)
    target = torch.cat([every[:0]] + [_target_rows(group, every, reduction) for group, reduction in pairs])
    return repack_rows(before, target, merges=merges)


def repack_rows(before: Pack, target: Tensor, *, merges: bool) -> Repacking:
    """The same, given for each row of the pack that of the token that stands for it, or -1: [T]. Every image keeps a
    token."""
    every = torch.arange(target.shape[0], device=target.device)
    leaving = target == every
    counts = F.pad(leaving.cumsum(0), (1, 0))[before.starts.long()].diff().tolist()
    stretches = torch.split(leaving.nonzero().squeeze(1), counts) if counts else ()
    order = sorted(range(len(counts)), key=counts.__getitem__)
    rows = torch.cat([every[:0]] + [stretches[stretch] for stretch in order])
    place = torch.full_like(every, -1).scatter(0, rows, every[: rows.shape[0]])
    place = torch.where(target < 0, -1, place[target.clamp(min=0)])
    after = Pack(
        images=tuple(before.images[stretch] for stretch in order),
        lengths=tuple(counts[stretch] for stretch in order),
        num_prefix_tokens=before.num_prefix_tokens,
        origin=gather(before.origin.unsqueeze(0), rows.unsqueeze(0)).squeeze(0),
        sizes=_summed(_sizes(before), place, rows.shape[0]) if merges else None,
        by_channel=before.by_channel,
    )
    return Repacking(before, after, rows, place)


def _target_rows(group: Group, every: Tensor, reduction: RaggedReduction) -> Tensor:
    """The reduction of one group in rows of the pack, prefix tokens included and kept: [g * length]."""
    own, target = group.of(every), or_the_first(reduction.target)
    prefix = group.length - target.shape[1]
    body = torch.where(target < 0, -1, target + own[:, prefix : prefix + 1])
    return torch.cat([own[:, :prefix], body], 1).reshape(-1)


def or_the_first(target: Tensor, real: Tensor | None = None) -> Tensor:
    """`target` [B, n] of a reduction, in which an image that would keep nothing keeps its first token. real: [B, n]
    which are tokens, None for all."""
    stays = target == torch.arange(target.shape[1], device=target.device)
    none_left = ~(stays if real is None else stays & real).any(1)
    return torch.cat([torch.where(none_left, 0, target[:, 0])[:, None], target[:, 1:]], 1)
