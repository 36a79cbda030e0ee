"""Blocks and heads of a model on a ragged batch: norms and MLPs take the packed tokens [1, T, C] as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.merge import gather
from tokenprune.method import Method
from tokenprune.ragged import Group, Pack, RaggedReduction, Repacking, or_the_first, pack_batch, repack, repack_rows
from tokenprune.ragged_attention import of_images, state_of
from tokenprune.recording import PlaceRecord
from tokenprune.regression import estimate, stride
from tokenprune.reindexing import reindexed
from tokenprune.restore import most_alike, seen
from tokenprune.state import TokenState, flow, in_backward

if TYPE_CHECKING:
    from tokenprune.method import Restore
    from tokenprune.site import Site


def _records(site: Site, x: Tensor, state: TokenState) -> Iterator[AttentionRecord]:
    """What a method may look at, for each group of images."""
    pack = state.pack
    if pack is None:
        if x.shape[0]:
            yield site.taps.record(x, state)
        return
    now = flow()
    captured = site.taps.captured() if now.groups is None else (None, None, None)
    for index, group in enumerate(pack.groups):
        own = state_of(group, pack, state)
        if now.groups is not None:
            parts, now.bias, now.rope = now.groups[index]
        else:
            parts = tuple(part if part is None else _heads_of(group, part) for part in captured)
            now.bias = now.rope = None
            reindexed(site, of_images(site, now.kwargs or {}, group.images), own, x.dtype)
        yield site.taps.record(group.of(x[0]), own, parts)


def _heads_of(group: Group, x: Tensor) -> Tensor:
    """The group's part of x [1, H, T, D], as [g, H, length, D]."""
    return group.of(x[0].transpose(0, 1)).transpose(1, 2)


def reduce_ragged(site: Site, x: Tensor, state: TokenState, keep: int) -> Tensor:
    """Score, select and reduce: x [B, P + n, C], or packed [1, T, C], to packed [1, T', C].

    keep: the most tokens that may leave an image.
    """
    patch, method = site.patch, site.patch.method
    if torch._C._get_tracing_state() is not None:
        raise UnsupportedMethod(f"{method.name} keeps a different number of tokens in each image: it cannot be traced")
    pack = state.pack
    at_once = method.padded and pack is not None and len(pack.groups) > 1 and flow().groups is None
    with torch.no_grad():
        rows: Tensor | None = None
        reductions: list[RaggedReduction] = []
        if at_once:
            rows = _target_rows(site, x, state, keep)
        else:
            reductions = [method.reduce_ragged(record, keep) for record in _records(site, x, state)]
        if patch.probe is not None:  # counted, not removed
            patch.mark(site, "reduced")
            return x
        if pack is None:
            prefix, by_channel = patch.num_prefix_tokens, x.stride(-1) != 1
            sizes = None if state.sizes is None else state.sizes[:, prefix:]
            pack = pack_batch(state.origins(x), sizes, prefix, by_channel=by_channel)
        compared = state.dense and not patch.fuses
        metrics = [_metric(method, group, x, pack, state) for group in pack.groups] if compared else []
        if rows is not None:
            repacking = repack_rows(pack, rows, merges=method.merges)
        else:
            repacking = repack(pack, reductions, merges=method.merges)
    counts = repacking.after.counts()
    if max(counts, default=0) > keep:
        raise UnsupportedMethod(f"{method.name} left {max(counts)} tokens of an image at {site.name}, more than {keep}")
    packed = x.reshape(-1, x.shape[-1])
    leaving = repacking(packed)
    if patch.fuses:
        state = state.undone_by(RaggedReturn(repacking, packed, leaving))
    elif state.dense:
        with torch.no_grad():
            state = state.undone_by(_undo(method.restoration, repacking, metrics))
    if state.forward is not None and not in_backward():
        state = replace(state, source=repacking.follow(_rows(state.source, state, pack)))
        place = _place(site.name, repacking.after, state)
        state.forward.places.append(place)  # type: ignore[union-attr]
    flow().state = replace(
        state,
        pack=repacking.after,
        tokens=max(counts, default=0),
        counts=(*state.counts, (site.index, counts)),
        origin=None,
        sizes=None,
        reduced=None,
    )
    return leaving[None]


def _target_rows(site: Site, x: Tensor, state: TokenState, keep: int) -> Tensor:
    """The row of the pack that stands for each row, or -1: [T], by a method that decides on all images at once, in a
    batch of equally many tokens of which those behind an image's last are none."""
    method, prefix, pack = site.patch.method, site.patch.num_prefix_tokens, state.pack
    assert pack is not None
    rows, real = pack.table
    origin = torch.where(real, pack.origin[rows], 0)[:, prefix:]
    sizes = pack.sizes[rows] if pack.sizes is not None else None
    own = replace(state, pack=None, tokens=origin.shape[1], origin=origin, sizes=sizes)
    now = flow()
    now.bias = now.rope = None
    reindexed(site, of_images(site, now.kwargs or {}, pack.images), own, x.dtype)
    parts = tuple(None if part is None else gather(part, rows, dim=2) for part in site.taps.captured())
    outside = torch.zeros(real.shape, dtype=x.dtype, device=x.device).masked_fill(~real, float("-inf"))[:, None, None]
    record = replace(
        site.taps.record(gather(x, rows), own, parts),
        bias=outside if now.bias is None else now.bias + outside,
        alive=real[:, prefix:].to(x.dtype),
    )
    target = or_the_first(method.reduce_ragged(record, keep).target, real[:, prefix:])
    body = torch.where(target < 0, -1, target + rows[:, :1] + prefix)
    return torch.cat([rows[:, :prefix], body], 1)[real]


def _metric(method: Method, group: Group, x: Tensor, pack: Pack, state: TokenState) -> Tensor:
    """What similarity of a group's tokens is measured on, [g, n, D], of x [B, P + n, C] or [1, T, C]."""
    own = state_of(group, pack, state)
    return seen(method.restoration, group.of(x.reshape(-1, x.shape[-1]))[:, pack.num_prefix_tokens :], own)


def _rows(rows: Tensor | None, state: TokenState, pack: Pack) -> Tensor:
    """Row of the pack of each original patch [B, entering], where nothing has been reduced before: in order."""
    if rows is not None:
        return rows
    first = pack.first_rows + pack.num_prefix_tokens
    return first[:, None] + torch.arange(state.entering, device=first.device)


@dataclass(frozen=True, eq=False)
class RaggedUndo:
    """`tokenprune.restore.Undo` from pack to pack.

    near: [T] row of the new pack whose value each row of the old one takes. images: for each image that lost tokens
    their rows [m], the rows [k] in the new pack of those it kept (or some of them), and the weights [m, k].
    """

    near: Tensor
    images: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def __call__(self, x: Tensor) -> Tensor:
        """x [T', C] to [T, C]."""
        full = x[self.near]
        if not self.images:
            return full
        rows = torch.cat([lost for lost, _, _ in self.images])
        values = [(weights.to(x.dtype) @ x[kept]).to(x.dtype) for _, kept, weights in self.images]
        return full.index_copy(0, rows, torch.cat(values))


@dataclass(frozen=True, eq=False)
class RaggedReturn:
    """`tokenprune.restore.Return` from pack to pack. full: [T, C], leaving: [T', C]."""

    repacking: Repacking
    full: Tensor
    leaving: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [T', C] to [T, C]."""
        place, full = self.repacking.place, self.full.to(x.dtype)
        gained = (x - self.leaving.to(x.dtype))[place.clamp(min=0)]
        came = torch.where((place >= 0).unsqueeze(-1), full + gained, full)
        return came if self.repacking.after.sizes is not None else came.index_copy(0, self.repacking.rows, x)


def _undo(choice: Restore, repacking: Repacking, metrics: list[Tensor]) -> RaggedUndo:
    """How the old pack is brought back. metrics: [g, n, D] of each group of it, what tokens are compared by."""
    prefix, images = repacking.before.num_prefix_tokens, []
    every = torch.arange(repacking.place.shape[0], device=repacking.place.device)
    near = repacking.place.clamp(min=0)
    for group, metric in zip(repacking.before.groups, metrics, strict=True):
        tables = (repacking.place, repacking.leaves(), every)
        for place, leaves, row, tokens in zip(*(group.of(table)[:, prefix:] for table in tables), metric, strict=True):
            lost = place < 0 if choice == "unmerge" else ~leaves
            if not lost.any():
                continue
            kept, values = tokens[leaves][None], place[leaves]
            if choice in ("feature", "place"):
                match = most_alike(choice, tokens[lost][None], kept)[0]
                near = near.index_copy(0, row[lost], values[match])
            else:
                step = stride(len(values))
                weights = estimate(tokens[lost][None], kept[:, ::step])[0]
                images.append((row[lost], values[::step], weights))
    return RaggedUndo(near, tuple(images))


def _place(name: str, pack: Pack, state: TokenState) -> PlaceRecord:
    prefix = pack.num_prefix_tokens
    source = state.source
    assert source is not None
    first = (pack.first_rows + prefix)[:, None]
    sizes = pack.padded(pack.sizes)[:, prefix:] if pack.sizes is not None else None
    kept = pack.padded(pack.origin, fill=-1)[:, prefix:]
    return PlaceRecord(name, kept, torch.where(source < 0, -1, source - first), sizes)


def restore_packed(x: Tensor, state: TokenState, pack: Pack) -> Tensor:
    """The full sequence [B, P + entering, C] behind the packed one x [1, T, C]."""
    full = x[0]
    for back in reversed(state.undo):
        full = back(full)
    return full.reshape(len(pack.images), pack.num_prefix_tokens + state.entering, x.shape[-1])


def unpack_for_head(x: Tensor, pack: Pack) -> Tensor:
    """What a model's head is given behind its last block: x [1, T, C] by image, [B, longest, C], zeros behind the
    last token of each, to be read by `head_by_length`."""
    entry = flow().entry
    if entry is not None:
        entry.pack = pack
    padded = pack.padded(x[0])
    return _by_channel(padded) if pack.by_channel else padded


def _by_channel(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def head_by_length(head: Callable[[Tensor], Tensor], x: Tensor, pack: Pack) -> Tensor:
    """A model's head on x [B, longest, C] as `unpack_for_head` has left it, once for the images of each length, so
    that its pooling sees the tokens of each image and no other."""
    if not pack.images:
        return head(x)
    by_channel = x.stride(-1) != 1
    parts = (x[list(group.images), : group.length] for group in pack.groups)
    outputs = [head(_by_channel(part) if by_channel else part) for part in parts]
    return torch.cat(outputs)[torch.tensor(pack.images, device=x.device).argsort()]
