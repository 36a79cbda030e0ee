"""A timm vision transformer run one image and one block at a time, with a reduction by plain loops.

The model's own submodules do the linear algebra, in float64; attention is the full matrix; everything that a reduction
decides or moves is a Python list. Nothing here is fast, and nothing here comes from the package under test.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Matrix = Sequence[Sequence[float]]


@dataclass
class Token:
    """A prunable token: its hidden state [C], the original patches in it, and the patch that stands for it."""

    hidden: Tensor
    members: tuple[int, ...]
    representative: int | None  # None: a fused token, which no single patch stands for
    weight: float | None = None  # what it counts for in attention and averages, where that is not its patches

    @property
    def size(self) -> float:
        return len(self.members) if self.weight is None else self.weight


@dataclass
class Place:
    """What a reduction sees of one image at one place: n patch tokens behind `prefix` others, N = prefix + n."""

    block: int
    tokens: list[Token]
    prefix: int
    class_token: bool
    attention: Sequence[Matrix]  # [head][query][key], N x N, as used by the block
    keys: Sequence[Matrix]  # [head][token][channel], after the key norm and before rotary
    keep: int  # of an adaptive method the most
    values: Sequence[Matrix] = ()  # [head][token][channel]
    queries: Sequence[Matrix] = ()  # [head][token][channel], after the query norm and before rotary
    entered: Sequence[Sequence[float]] = ()  # hidden states of the patch tokens as they entered the block
    margins: list[float] = field(default_factory=list)  # how close each decision was; 0 would be a tie


Reduce = Callable[[Place], list[Token]]
Leaving = Callable[[int], int]


@dataclass
class Passage:
    """One place of one image: the patches that leave it, and for each original patch where it is now (-1: gone)."""

    kept: list[int | None]
    source: list[int]


@dataclass
class Outcome:
    logits: Tensor  # [B, classes], float64
    passages: list[dict[int, Passage]]  # of each image, by block
    margin: float  # the closest decision of all


def leaving_share(share: float) -> Leaving:
    return lambda n: max(1, math.ceil(share * n - 1e-6))


def leaving_less(removed: int) -> Leaving:
    return lambda n: n - removed


def _rotate(x: Tensor, row: Tensor) -> Tensor:
    """Rotates the channel pairs (0, 1), (2, 3), ... of x [H, d] by the angles of one row [2 d]: sines, then cosines."""
    dim = x.shape[-1]
    sine, cosine = row[:dim], row[dim:]
    turned = torch.empty_like(x)
    turned[:, 0::2], turned[:, 1::2] = -x[:, 1::2], x[:, 0::2]
    return cosine * x + sine * turned


def _attend(
    attn: nn.Module, x: Tensor, rows: Sequence[Tensor | None], sizes: Sequence[float]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Attention over x [N, C] with log(size) on each key's logit: the output [N, C], A [H, N, N], and queries, keys and
    values [H, N, d], before rotary."""
    n = x.shape[0]
    q, k, v = attn.qkv(x).reshape(n, 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    parts = q, k, v
    q = torch.stack([q[:, i] if row is None else _rotate(q[:, i], row) for i, row in enumerate(rows)], dim=1)
    k = torch.stack([k[:, i] if row is None else _rotate(k[:, i], row) for i, row in enumerate(rows)], dim=1)
    logits = attn.scale * (q @ k.transpose(1, 2))
    for j, size in enumerate(sizes):
        logits[:, :, j] += math.log(size)
    attention = logits.softmax(dim=-1)
    out = (attention @ v).transpose(0, 1).reshape(n, attn.attn_dim)
    out = attn.norm(out)
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj(out), attention, parts


def _branch(block: nn.Module, number: int, y: Tensor) -> Tensor:
    """LayerScale of the first (attention) or second (MLP) branch, in timm's two spellings."""
    if hasattr(block, f"ls{number}"):
        return getattr(block, f"ls{number}")(y)
    gamma = getattr(block, f"gamma_{number}")
    return y if gamma is None else gamma * y


def _run_image(
    model: nn.Module,
    image: Tensor,
    reduce: Reduce,
    schedule: Mapping[int, Leaving],
    *,
    after_block: bool,
    proportional: bool,
    weighted_pool: bool,
    adaptive: bool,
    margins: list[float],
) -> tuple[Tensor, dict[int, Passage]]:
    embedded = model._pos_embed(model.patch_embed(image[None]))
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    x = model.norm_pre(x)[0]
    p = model.num_prefix_tokens
    class_token = getattr(model, "cls_token", None) is not None
    prefix = x[:p]
    tokens = [Token(x[p + j], (j,), j) for j in range(x.shape[0] - p)]
    patches = len(tokens)
    passages: dict[int, Passage] = {}

    for index, block in enumerate(model.blocks):
        x = torch.cat([prefix, torch.stack([token.hidden for token in tokens])])
        rows = [None] * p + [None if rope is None else rope[token.representative] for token in tokens]
        sizes = [1] * p + [token.size if proportional else 1 for token in tokens]
        entered = x[p:].tolist()
        out, attention, (queries, keys, values) = _attend(block.attn, block.norm1(x), rows, sizes)
        x = x + _branch(block, 1, out)
        if after_block:
            x = x + _branch(block, 2, block.mlp(block.norm2(x)))
        prefix = x[:p]
        tokens = [dataclasses.replace(token, hidden=x[p + j]) for j, token in enumerate(tokens)]
        if index in schedule:
            keep = schedule[index](len(tokens))
            place = Place(
                index,
                tokens,
                p,
                class_token,
                attention.tolist(),
                keys.tolist(),
                keep,
                values.tolist(),
                queries.tolist(),
                entered,
            )
            if keep < len(tokens) or adaptive:
                tokens = reduce(place)
            assert 1 <= len(tokens) <= keep if adaptive else len(tokens) == keep
            margins.extend(place.margins)
            passages[index] = _passage(tokens, patches)
        if not after_block:
            x = torch.cat([prefix, torch.stack([token.hidden for token in tokens])])
            x = x + _branch(block, 2, block.mlp(block.norm2(x)))
            prefix = x[:p]
            tokens = [dataclasses.replace(token, hidden=x[p + j]) for j, token in enumerate(tokens)]

    x = model.norm(torch.cat([prefix, torch.stack([token.hidden for token in tokens])]))
    if model.global_pool == "token":
        pooled = x[0]
    else:
        assert model.global_pool == "avg"
        pooled, total = torch.zeros_like(x[0]), 0
        for j, token in enumerate(tokens):
            weight = token.size if weighted_pool else 1
            pooled, total = pooled + weight * x[p + j], total + weight
        pooled = pooled / total
    return model.head(model.fc_norm(pooled)), passages


def _passage(tokens: Sequence[Token], patches: int) -> Passage:
    source = [-1] * patches
    for position, token in enumerate(tokens):
        for member in token.members:
            source[member] = position
    return Passage([token.representative for token in tokens], source)


@torch.no_grad()
def run(
    model: nn.Module,
    images: Tensor,
    reduce: Reduce,
    schedule: Mapping[int, Leaving],
    *,
    after_block: bool = False,
    proportional: bool = False,
    weighted_pool: bool = False,
    adaptive: bool = False,
) -> Outcome:
    """Runs `model` on `images` [B, 3, H, W], reducing in each block of `schedule`.

    `after_block`: behind the MLP of the block instead of between its attention and its MLP. `proportional`: log(size)
    on the logits of later blocks. `weighted_pool`: a final mean weights each token by its size. `adaptive`: each image
    keeps a number of its own, at most what the schedule says.
    """
    exact = copy.deepcopy(model).double().eval()
    margins: list[float] = [math.inf]
    logits, passages = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny operations: more threads only wait for each other
    try:
        for image in images.double():
            one, where = _run_image(
                exact,
                image,
                reduce,
                schedule,
                after_block=after_block,
                proportional=proportional,
                weighted_pool=weighted_pool,
                adaptive=adaptive,
                margins=margins,
            )
            logits.append(one)
            passages.append(where)
    finally:
        torch.set_num_threads(threads)
    return Outcome(torch.stack(logits), passages, min(margins))
