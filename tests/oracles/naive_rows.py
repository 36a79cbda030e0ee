"""A tower that takes all images in one row (Qwen-VL), run image by image and segment by segment, with a reduction by
plain loops. The tower's own submodules do the linear algebra; nothing here comes from the package under test."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from naive_vit import Leaving, Place, Reduce, Token
from torch import Tensor


def laying(rows: int, columns: int, merge: int, window: int | None) -> list[int]:
    """The patch, counted row by row, at each place of an image in its row. window: merged groups along a side."""
    groups = [(r, c) for r in range(rows // merge) for c in range(columns // merge)]
    if window is not None:
        groups.sort(key=lambda group: (group[0] // window, group[1] // window, *group))
    return [
        (r * merge + i) * columns + c * merge + j for r, c in groups for i in range(merge) for j in range(merge)
    ]  # fmt: skip


@dataclass
class RowOutcome:
    """hidden: {place in the row: what stands for it behind the last block}. after: the same behind each block. kept: of
    each image and each place, places in the image's row. margin: the closest decision."""

    hidden: dict[int, Tensor]
    after: list[dict[int, Tensor]]
    kept: list[dict[int, list[int]]]
    margins: list[float] = field(default_factory=list)


def _caught(tower: Any, pixels: Tensor, grids: Tensor) -> list[tuple[Tensor, list[int], Tensor, Tensor]]:
    found: list[Any] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        found.append((args[0], kwargs["cu_seqlens"].tolist(), *kwargs["position_embeddings"]))

    hooks = [block.register_forward_pre_hook(look, with_kwargs=True) for block in tower.blocks]
    tower(pixels, grids)
    for hook in hooks:
        hook.remove()
    return found


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@torch.no_grad()
def run(
    tower: Any,
    pixels: Tensor,
    grids: Tensor,
    reduce: Reduce,
    schedule: Mapping[int, Leaving],
    *,
    proportional: bool = False,
) -> RowOutcome:
    calls = _caught(tower, pixels, grids)
    sizes = [rows * columns for frames, rows, columns in grids.tolist() for _ in range(frames)]
    outcome = RowOutcome({}, [{} for _ in tower.blocks], [])
    first = 0
    for size in sizes:
        tokens = [Token(calls[0][0][first + i], (i,), i) for i in range(size)]
        kept = {}
        for index, (block, (_, starts, cos, sin)) in enumerate(zip(tower.blocks, calls, strict=True)):
            place, tokens = _attend(index, block, tokens, first, starts, cos, sin, proportional)
            if index in schedule:
                place.keep = schedule[index](len(tokens))
                tokens = sorted(reduce(place), key=lambda token: int(token.representative))  # type: ignore[arg-type]
                outcome.margins += place.margins
                kept[index] = [int(token.representative) for token in tokens]  # type: ignore[arg-type]
            for token in tokens:
                token.hidden = token.hidden + block.mlp(block.norm2(token.hidden[None]))[0]
                for member in token.members:
                    outcome.after[index][first + member] = token.hidden
        outcome.kept.append(kept)
        first += size
    outcome.hidden = outcome.after[-1]
    return outcome


def _attend(
    index: int,
    block: Any,
    tokens: list[Token],
    first: int,
    starts: list[int],
    cos: Tensor,
    sin: Tensor,
    proportional: bool,
) -> tuple[Place, list[Token]]:
    heads = block.attn.num_heads
    segment = [sum(start <= first + int(token.representative) for start in starts) for token in tokens]  # type: ignore[arg-type]
    x = torch.stack([token.hidden for token in tokens])
    qkv = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, heads, -1)
    rows = [first + int(token.representative) for token in tokens]  # type: ignore[arg-type]
    q, k, v = (qkv[:, part].transpose(0, 1) for part in range(3))
    logits = _rotated(q, cos[rows], sin[rows]) @ _rotated(k, cos[rows], sin[rows]).transpose(1, 2)
    together = torch.tensor([[a == b for b in segment] for a in segment])
    logits = logits * q.shape[-1] ** -0.5
    if proportional:
        logits = logits + torch.tensor([float(token.size) for token in tokens]).log()
    attention = logits.masked_fill(~together, float("-inf")).softmax(-1)
    out = x + block.attn.proj((attention @ v).transpose(0, 1).reshape(len(x), -1))
    moved = [Token(h, token.members, token.representative) for h, token in zip(out, tokens, strict=True)]
    place = Place(
        block=index, tokens=moved, prefix=0, class_token=False, attention=attention.tolist(), keys=k.tolist(), keep=0
    )
    return place, moved
