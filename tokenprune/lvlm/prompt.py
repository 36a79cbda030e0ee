"""Which tokens of a prompt are kept: the images are found in it, and the method chooses among the tokens of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.lvlm.encoded import Encoded
from tokenprune.lvlm.plan import counts_of, refuse_nothing, whole_rows
from tokenprune.lvlm.prefill import solve_tokens
from tokenprune.lvlm.record import record_of
from tokenprune.recording import Forward, PlaceRecord

if TYPE_CHECKING:
    from tokenprune.lvlm.patch import LvlmPatch


@dataclass(frozen=True)
class Image:
    """One image of a prompt. sample: row of the batch. flat: [n] places of its tokens in the flattened batch, without
    separators. scores: [n], metric: [n, d] of them, None where not needed. merged: whether its features were merged
    before they were projected. places: tokens with separators."""

    sample: int
    flat: Tensor
    scores: Tensor | None
    metric: Tensor | None
    grid: tuple[int, int] | None
    merged: bool
    places: int


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
                images.append(
                    Image(sample, tokens[own], scores, metric, known.grids[place], known.merged, sizes[place])
                )
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
    padding: Tensor | None,
) -> Prompt:
    """What is kept of a batch of prompts with embeddings [B, L, C]; deepstack: of all placeholders, [V, C] each;
    padding: [B, tokens] False for padding, None without."""
    batch, length, width = embeds.shape
    after = patch.after
    assert after is not None
    rows = embeds.reshape(-1, width)
    texts = _texts(embeds, visual, padding, patch.local.candidates) if after.text else None
    if patch.budget.kind == "flops":
        for image in images:
            _count_choosing(patch, image, rows, texts)
    counts = _counts(patch, images, batch)
    for image, count in zip(images, counts, strict=True):
        patch.local.prompts[image.sample].keep(len(image.flat), count)
    keep = embeds.new_ones(batch * length, dtype=torch.bool)
    deep = None
    if deepstack is not None:
        seen = torch.stack(list(visual.values())).any(0)
        deep = [
            one.new_zeros(batch, length, one.shape[-1]).masked_scatter(seen.unsqueeze(-1), one) for one in deepstack
        ]
    alike: dict[tuple[Any, ...], list[Image]] = {}
    for image, count in zip(images, counts, strict=True):
        words = len(texts[image.sample]) if texts is not None else 0
        alike.setdefault((len(image.flat), count, image.grid, words), []).append(image)
    for (size, count, grid, _), group in alike.items():
        flat = torch.stack([image.flat for image in group])
        record = record_of(
            rows[flat].detach(),
            grid,
            _stacked([image.metric for image in group]),
            torch.stack([texts[image.sample] for image in group]) if texts is not None else None,
        )
        scores = _stacked([image.scores for image in group])
        with torch.no_grad():
            choosing = partial(after.select, scores, record, count)
            reduction = patch.spent.choosing(("select", len(group), size, count), choosing)
        kept = flat.gather(1, reduction.kept)
        keep = keep.index_fill(0, flat.flatten(), False).index_fill(0, kept.flatten(), True)
        if reduction.mixes or reduction.moved is not None:
            if not group[0].merged:
                rows = rows.index_copy(0, kept.flatten(), reduction(rows[flat]).flatten(0, 1))
            if deep is not None:
                deep = [_merged(one, reduction, flat, kept) for one in deep]
        for recording in patch.recordings:
            place = PlaceRecord("after the tower", reduction.kept, reduction.source(size), None)
            recording.forwards.append(Forward(grid, [place]))
    patch.seen = tuple((len(image.flat), count) for image, count in zip(images, counts, strict=True))
    return Prompt(keep.view(batch, length), rows.view_as(embeds), deep)


def _count_choosing(patch: LvlmPatch, image: Image, rows: Tensor, texts: Sequence[Tensor] | None) -> None:
    """Find out what a selection costs, where none of an image of this size has been counted."""
    size, after = len(image.flat), patch.after
    assert after is not None
    if any(key[0] == "select" and key[2] == size for key in patch.spent.choice):
        return
    record = record_of(
        rows[image.flat].detach().unsqueeze(0),
        image.grid,
        _stacked([image.metric]),
        texts[image.sample].unsqueeze(0) if texts is not None else None,
    )
    unit = image.grid[1] if after.whole_rows and image.grid is not None else 1
    with torch.no_grad():
        for third in (1, 2, 3):
            keep = min(size, unit * max(1, size * third // (3 * unit)))
            patch.spent.choosing(
                ("select", 1, size, keep), partial(after.select, _stacked([image.scores]), record, keep)
            )


def _texts(embeds: Tensor, visual: Mapping[str, Tensor], padding: Tensor | None, candidates: int) -> list[Tensor]:
    """Embeddings [T, C] of each sample's text, without the last `candidates` tokens."""
    text = ~torch.stack(list(visual.values())).any(0)
    text[:, text.shape[1] - candidates :] = False
    if padding is not None:
        text &= padding[:, -text.shape[1] :]
    return [row[own].detach() for row, own in zip(embeds, text, strict=True)]


def _merged(deep: Tensor, reduction: object, flat: Tensor, kept: Tensor) -> Tensor:
    rows = deep.flatten(0, 1)
    merged: Tensor = reduction(rows[flat])  # type: ignore[operator]
    return rows.index_copy(0, kept.flatten(), merged.flatten(0, 1)).view_as(deep)


def _counts(patch: LvlmPatch, images: Sequence[Image], batch: int) -> list[int]:
    counts: list[int] = []
    sizes = [len(image.flat) for image in images]
    for sample in range(batch):
        mine = [image for image in images if image.sample == sample]
        if mine:
            counts += _of_sample(patch, mine)
    refuse_nothing(patch.budget, sizes, counts)
    return counts


def _of_sample(patch: LvlmPatch, images: Sequence[Image]) -> list[int]:
    after = patch.after
    assert after is not None
    if after.count is not None and patch.budget.kind == "default":
        return [after.count(image.scores) for image in images if image.scores is not None]
    sizes = [len(image.flat) for image in images]
    if patch.budget.kind == "flops":
        return solve_tokens(patch, patch.local.prompts[images[0].sample], sizes)
    counts = counts_of(patch.budget, patch.share, sizes)
    if after.whole_rows or "grid" in patch.method.needs:
        for image in images:
            if image.grid is None:
                raise UnsupportedMethod(
                    f"{patch.method.name} works on the rows of an image, and {len(image.flat)} tokens here are of"
                    " several tiles or frames; 'uniform' and 'top_k' work"
                )
    if not after.whole_rows:
        return counts
    return [
        whole_rows(patch.budget, count, image.grid) for count, image in zip(counts, images, strict=True) if image.grid
    ]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.stack([part for part in parts if part is not None])
