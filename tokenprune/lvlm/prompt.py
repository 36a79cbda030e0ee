"""Which tokens of a prompt are kept: the images are found in it, and the method chooses among the tokens of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedModel
from tokenprune.lvlm.encoded import Encoded
from tokenprune.lvlm.plan import counts_of, refuse_nothing
from tokenprune.recording import Forward, PlaceRecord

if TYPE_CHECKING:
    from tokenprune.lvlm.patch import LvlmPatch


@dataclass(frozen=True)
class Image:
    """One image of a prompt. sample: row of the batch. flat: [n] places of its tokens in the flattened batch, without
    separators. scores: [n], metric: [n, d] of them, None where not needed."""

    sample: int
    flat: Tensor
    scores: Tensor | None
    metric: Tensor | None
    grid: tuple[int, int] | None


@dataclass(eq=False)
class Prompt:
    """keep: [B, L] tokens that go on. embeds: [B, L, C], merged tokens in the places they take. deepstack: what is
    added to the hidden states of the first layers, [B, L, C] each, None without."""

    keep: Tensor
    embeds: Tensor
    deepstack: list[Tensor] | None = None


def find_images(visual: Mapping[str, Tensor], encoded: Sequence[Encoded]) -> list[Image]:
    """The images of a batch of prompts. visual: {modality: placeholders [B, L]}; encoded: of each modality that has
    any, in this order. Prompts that were repeated (beams) share their images."""
    present = [where for where in visual.values() if bool(where.any())]
    if len(present) != len(encoded):
        raise UnsupportedModel(
            f"{len(encoded)} calls of the image tower for {len(present)} kinds of placeholders in the prompt"
        )
    images = []
    for where, known in zip(present, encoded, strict=True):
        assert known.images is not None
        flat = where.flatten().nonzero().squeeze(1)
        sizes = [len(image) for image in known.images]
        start = 0
        for sample, of_sample in enumerate(_share(where.sum(1).tolist(), sizes)):
            for place in of_sample:
                own, scores, metric = known.take(place)
                tokens = flat[start : start + sizes[place]]
                images.append(Image(sample, tokens[own], scores, metric, known.grids[place]))
                start += sizes[place]
    return sorted(images, key=lambda image: image.sample)


def _share(placeholders: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Which images belong to each sample, from the placeholders that it has."""
    repeats, rest = divmod(sum(placeholders), max(1, sum(sizes)))
    shared: list[list[int]] = []
    image = 0
    for sample, count in enumerate(placeholders):
        if repeats and sample % repeats:
            shared.append(shared[-1])
            continue
        mine = []
        while count > 0 and image < len(sizes):
            mine.append(image)
            count -= sizes[image]
            image += 1
        rest += abs(count)
        shared.append(mine)
    if rest or image < len(sizes):
        raise UnsupportedModel(
            f"the prompts have {list(placeholders)} placeholders, and the images {list(sizes)} tokens: they do not fit"
        )
    return shared


def choose(
    patch: LvlmPatch,
    images: Sequence[Image],
    embeds: Tensor,
    visual: Mapping[str, Tensor],
    deepstack: Sequence[Tensor] | None,
) -> Prompt:
    """What is kept of a batch of prompts with embeddings [B, L, C]; deepstack: of all placeholders, [V, C] each."""
    batch, length, width = embeds.shape
    counts = _counts(patch, images, batch)
    keep = embeds.new_ones(batch * length, dtype=torch.bool)
    rows, deep = embeds.reshape(-1, width), None
    if deepstack is not None:
        seen = torch.stack(list(visual.values())).any(0)
        deep = [
            one.new_zeros(batch, length, one.shape[-1]).masked_scatter(seen.unsqueeze(-1), one) for one in deepstack
        ]
    alike: dict[tuple[int, int, tuple[int, int] | None], list[Image]] = {}
    for image, count in zip(images, counts, strict=True):
        alike.setdefault((len(image.flat), count, image.grid), []).append(image)
    for (size, count, grid), group in alike.items():
        flat = torch.stack([image.flat for image in group])
        record = AttentionRecord(
            hidden=rows[flat],
            origin=torch.arange(size, device=flat.device).expand(len(group), -1),
            num_prefix_tokens=0,
            place=0,
            depth=1,
            grid=grid,
            has_class_token=False,
            keys=_stacked([image.metric for image in group], 1),
        )
        with torch.no_grad():
            reduction = patch.after.select(_stacked([image.scores for image in group]), record, count)
        kept = flat.gather(1, reduction.kept)
        keep = keep.index_fill(0, flat.flatten(), False).index_fill(0, kept.flatten(), True)
        if reduction.matrix is not None or reduction.moved is not None:
            rows = rows.index_copy(0, kept.flatten(), reduction(record.hidden).flatten(0, 1))
            if deep is not None:
                deep = [_merged(one, reduction, flat, kept) for one in deep]
        for recording in patch.recordings:
            place = PlaceRecord("after the tower", reduction.kept, reduction.source(size), None)
            recording.forwards.append(Forward(grid, [place]))
    patch.seen = tuple((len(image.flat), count) for image, count in zip(images, counts, strict=True))
    return Prompt(keep.view(batch, length), rows.view_as(embeds), deep)


def _merged(deep: Tensor, reduction: object, flat: Tensor, kept: Tensor) -> Tensor:
    rows = deep.flatten(0, 1)
    merged: Tensor = reduction(rows[flat])  # type: ignore[operator]
    return rows.index_copy(0, kept.flatten(), merged.flatten(0, 1)).view_as(deep)


def _counts(patch: LvlmPatch, images: Sequence[Image], batch: int) -> list[int]:
    counts: list[int] = []
    sizes = [len(image.flat) for image in images]
    for sample in range(batch):
        mine = [len(image.flat) for image in images if image.sample == sample]
        if mine:
            counts += counts_of(patch.budget, patch.share, mine)
    refuse_nothing(patch.budget, sizes, counts)
    return counts


def _stacked(parts: Sequence[Tensor | None], *dims: int) -> Tensor | None:
    if parts[0] is None:
        return None
    whole = torch.stack([part for part in parts if part is not None])
    return whole.unsqueeze(dims[0]) if dims else whole
