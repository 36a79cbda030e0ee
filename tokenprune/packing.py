"""The adaptive path: blocks, attention and heads of a model run on a ragged batch (see `tokenprune.ragged`).

Norms and MLPs take the packed tokens [1, T, C] as they are. The host's own attention runs on them too, and where it
calls scaled_dot_product_attention the packed kernel answers; an attention that works otherwise (a bias of its own, no
fused call) runs once for each length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.packed_attention import packed_attention
from tokenprune.ragged import Group, Pack, Repacking, pack_batch, repack
from tokenprune.recording import PlaceRecord
from tokenprune.state import FLOW, TokenState, in_backward

if TYPE_CHECKING:
    from tokenprune.host import Caught
    from tokenprune.site import Site

Forward = Callable[..., Tensor]


class AnswerAttention(TorchFunctionMode):
    """While it is on, scaled_dot_product_attention over a packed sequence stays within each image.

    calls: how many it has answered.
    """

    def __init__(self, lengths: tuple[int, ...], starts: Tensor) -> None:
        super().__init__()
        self.lengths, self.starts = lengths, starts
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.attend(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """query, key, value: [1, H, T, D]; attn_mask: a bias of the keys [1, 1, 1, T] or None."""
        if (
            query.shape[0] != 1
            or is_causal
            or enable_gqa
            or (attn_mask is not None and attn_mask.shape[:3] != (1, 1, 1))
        ):
            raise UnsupportedModel("this attention makes a call that the packed kernel cannot answer")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        bias = attn_mask.reshape(-1) if attn_mask is not None else None
        out = packed_attention(
            q, k, v, self.starts, lengths=self.lengths, key_bias=bias, scale=scale, dropout=dropout_p
        )
        return out.transpose(0, 1)[None]


def attend_here(forward: Forward, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An attention's own `forward` on x, within each image where x [1, T, C] is a ragged batch."""
    site, state = FLOW.site, FLOW.state
    if site is None or state is None or state.pack is None:
        return forward(x, *args, **kwargs)
    FLOW.attended = True
    out = _answered(site, state, state.pack, forward, x, args, kwargs) if site.intercepts else None
    return out if out is not None else _per_length(site, state, state.pack, forward, x, args, kwargs)


def _answered(
    site: Site,
    state: TokenState,
    pack: Pack,
    forward: Forward,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """One call for all images; None where that cannot be."""
    kwargs = dict(kwargs)
    if any(kwargs.get(name) is not None for name in site.bias_arguments):
        return None
    rope = kwargs.get(site.rope_argument) if site.rope_argument is not None else None
    if rope is not None:
        if site.rope_identity is None:
            return None
        kwargs[site.rope_argument] = packed_rope(rope, pack, site.rope_identity(rope))
    if site.patch.method.proportional and pack.sizes is not None and site.key_bias is not None:
        kwargs[site.key_bias] = pack.sizes.log().to(x.dtype)[None, None, None]
    with AnswerAttention(pack.lengths, pack.starts()) as answer:
        out = forward(x, *args, **kwargs)
    return out if answer.calls else None


def _per_length(
    site: Site,
    state: TokenState,
    pack: Pack,
    forward: Forward,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """One call for the images of each length, each as if they were a batch of their own."""
    outputs, captured = [], []
    inputs, values = FLOW.inputs, FLOW.values  # caught before the call
    for group in pack.groups:
        FLOW.state = state_of(group, pack, state)
        FLOW.queries = FLOW.keys = FLOW.bias = FLOW.rope = None
        FLOW.inputs, FLOW.values = _part(group, inputs), _part(group, values)
        own = site._reindexed(_of_images(site, kwargs, group), FLOW.state, x.dtype)
        outputs.append(forward(group.of(x[0]), *args, **own).flatten(0, 1))
        captured.append((site.captured(), FLOW.bias, FLOW.rope) if site.reduces else None)
    FLOW.state, FLOW.groups = state, captured
    return torch.cat(outputs)[None] if outputs else x


def _part(group: Group, caught: Caught | None) -> Caught | None:
    return None if caught is None else (caught[0], group.of(caught[1][0]))


def each_image_here(draw: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x times what `draw` makes of a one for each image: a random factor [B, 1, 1], where x [1, T, C] is packed."""
    state = FLOW.state
    if state is None or state.pack is None:
        return draw(x)
    lengths = torch.tensor(state.pack.lengths, device=x.device)
    factors = draw(x.new_ones(len(state.pack.lengths), 1, 1))
    return x * factors[:, 0].repeat_interleave(lengths, 0)[None]


def packed_rope(table: Tensor, pack: Pack, identity: Tensor) -> Tensor:
    """Rotary rows of a packed sequence behind its first P tokens, `identity` [D] for the other images' prefix tokens.

    table: [N, D], [H, N, D] or [B, 1 or H, N, D] over the full grid. Returns [1, 1 or H, T - P, D].
    """
    origin = pack.origin[pack.num_prefix_tokens :]
    row = origin.clamp(min=0)
    if table.ndim == 4 and table.shape[0] > 1:
        lengths = torch.tensor(pack.lengths, device=origin.device)
        image = torch.tensor(pack.images, device=origin.device).repeat_interleave(lengths)
        rows = table[image[pack.num_prefix_tokens :], :, row].transpose(0, 1)
    else:
        rows = table.reshape(-1, *table.shape[-2:])[:, row]
    return torch.where((origin < 0)[:, None], identity, rows)[None]


def _of_images(site: Site, kwargs: dict[str, Any], group: Group) -> dict[str, Any]:
    """The block's arguments of the group's images, where they hold one entry for each image."""
    kwargs = dict(kwargs)
    for name in (site.rope_argument, *site.bias_arguments):
        value = kwargs.get(name) if name is not None else None
        if value is not None and value.ndim == 4 and value.shape[0] > 1:
            kwargs[name] = value[list(group.images)]
    return kwargs


def state_of(group: Group, pack: Pack, state: TokenState) -> TokenState:
    """The state of a group's images, which have equally many tokens."""
    prefix = pack.num_prefix_tokens
    sizes = group.of(pack.sizes)[:, prefix:] if pack.sizes is not None else None
    origin = group.of(pack.origin)[:, prefix:]
    return replace(state, pack=None, tokens=group.length - prefix, origin=origin, sizes=sizes)


def _records(site: Site, x: Tensor, state: TokenState) -> Iterator[AttentionRecord]:
    """What a method may look at, for each group of images."""
    pack = state.pack
    if pack is None:
        if x.shape[0]:
            yield site._record(x, state)
        return
    captured = site.captured() if FLOW.groups is None else (None, None, None)
    for index, group in enumerate(pack.groups):
        own = state_of(group, pack, state)
        if FLOW.groups is not None:
            parts, FLOW.bias, FLOW.rope = FLOW.groups[index]
        else:
            parts = tuple(
                part if part is None else group.of(part[0].transpose(0, 1)).transpose(1, 2) for part in captured
            )
            FLOW.bias = FLOW.rope = None
            site._reindexed(_of_images(site, FLOW.kwargs, group), own, x.dtype)
        yield site._record(group.of(x[0]), own, parts)


def reduce_ragged(site: Site, x: Tensor, state: TokenState, keep: int) -> Tensor:
    """Score, select and reduce: x [B, P + n, C], or packed [1, T, C], to packed [1, T', C].

    keep: the most tokens that may leave an image.
    """
    patch, method = site.patch, site.patch.method
    if torch.jit.is_tracing():
        raise UnsupportedMethod(f"{method.name} keeps a different number of tokens in each image: it cannot be traced")
    pack = state.pack
    with torch.no_grad():
        metrics, reductions = [], []
        for record in _records(site, x, state):
            reductions.append(method.reduce_ragged(record, keep))
            metrics.append(record.metric if state.dense else None)
        if patch.probe is not None:  # counted, not removed
            patch.mark(site, "reduced")
            return x
        if pack is None:
            pack = pack_batch(state.origins(x), state.sizes, patch.num_prefix_tokens)
        repacking = repack(pack, reductions, merges=method.merges)
    counts = repacking.after.counts()
    if max(counts, default=0) > keep:
        raise UnsupportedMethod(f"{method.name} left {max(counts)} tokens of an image at {site.name}, more than {keep}")
    if state.dense:
        near = _near_rows(repacking, metrics)
        state = replace(state, stand_in=near[_rows(state.stand_in, state, pack)])
    if state.forward is not None and not in_backward():
        state = replace(state, source=repacking.follow(_rows(state.source, state, pack)))
        state.forward.places.append(_place(site.name, repacking.after, state))
    patch.note_ragged(site.name, pack.counts(), counts)
    FLOW.state = replace(
        state, pack=repacking.after, tokens=max(counts, default=0), origin=None, sizes=None, reduced=None
    )
    return repacking(x.reshape(-1, x.shape[-1]))[None]


def _rows(rows: Tensor | None, state: TokenState, pack: Pack) -> Tensor:
    """Row of the pack of each original patch [B, entering], where nothing has been reduced before: in order."""
    if rows is not None:
        return rows
    first = pack.rows_of_images() + pack.num_prefix_tokens
    return first[:, None] + torch.arange(state.entering, device=first.device)


def _near_rows(repacking: Repacking, metrics: list[Tensor | None]) -> Tensor:
    """Row of the new pack whose value restores each token of the old one, [T]: a dropped one is restored by the kept
    one with the most similar key (similarity-based recovery, AT-EDM section 3.3)."""
    near, prefix = repacking.place.clone(), repacking.before.num_prefix_tokens
    for group, metric in zip(repacking.before.groups, metrics, strict=True):
        assert metric is not None
        places = group.of(repacking.place)[:, prefix:]
        leaving = group.of(repacking.leaves())[:, prefix:]
        rows = group.of(torch.arange(near.shape[0], device=near.device))[:, prefix:]
        for place, kept, row, keys in zip(places, leaving, rows, metric, strict=True):
            lost = place < 0
            match = cosine_match(keys[lost][None], keys[kept][None])[1][0]
            near[row[lost]] = place[kept][match]
    return near


def _place(name: str, pack: Pack, state: TokenState) -> PlaceRecord:
    prefix = pack.num_prefix_tokens
    source = state.source
    assert source is not None
    first = (pack.rows_of_images() + prefix)[:, None]
    sizes = pack.padded(pack.sizes)[:, prefix:] if pack.sizes is not None else None
    kept = pack.padded(pack.origin, fill=-1)[:, prefix:]
    return PlaceRecord(name, kept, torch.where(source < 0, -1, source - first), sizes)


def restore_packed(x: Tensor, state: TokenState, pack: Pack) -> Tensor:
    """The full sequence [B, P + entering, C] behind the packed one x [1, T, C]."""
    prefix = torch.arange(pack.num_prefix_tokens, device=x.device)
    rows = torch.cat([pack.rows_of_images()[:, None] + prefix, _rows(state.stand_in, state, pack)], 1)
    return x[0][rows]


def unpack_for_head(x: Tensor, pack: Pack) -> Tensor:
    """What a model's head is given behind its last block: x [1, T, C] by image, [B, longest, C], zeros behind the
    last token of each, to be read by `head_by_length`."""
    if FLOW.entry is not None:
        FLOW.entry.pack = pack
    return pack.padded(x[0])


def head_by_length(head: Forward, x: Tensor, pack: Pack) -> Tensor:
    """A model's head on x [B, longest, C] as `unpack_for_head` has left it, once for the images of each length, so
    that its pooling sees the tokens of each image and no other."""
    if not pack.images:
        return head(x)
    outputs = [head(x[list(group.images), : group.length]) for group in pack.groups]
    return torch.cat(outputs)[torch.tensor(pack.images, device=x.device).argsort()]
