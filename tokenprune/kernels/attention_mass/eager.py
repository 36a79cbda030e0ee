"""Attention mass in plain torch on any device, without the full map: `tiled` and `matrix_free`.

On a CPU the work goes through a buffer that stays in the cache, which is worth more than any operation saved: a fresh
map is written to memory page by page. A block of whole rows needs no log-sum-exp, so the matrix-free path computes the
map anew in each iteration; where logits are known to be small, the exponential alone, which takes half of the softmax.

Both take q [B, H, M, D], k [B, H, N, D], weights [B, H, M], a bias [1|B, 1|H, 1|M, N], a mask or None, the rising
`counts` of iterations after which the mass is wanted, and the `tolerance`, the L1 change below which a pair has settled
(0: none). Both return [len(counts), B, H, N], and fill `log_sums` [B, H, M], where given, with the log-sum-exp of each
row of logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.kernels.attention_mass.iterate import iterate, push_into
from tokenprune.kernels.attention_mass.tiles import Exponentials, Tile, flat, tiles
from tokenprune.kernels.inputs import additive, precision, product

# Bytes of the map that a thread works on at a time: measured best from 1 to 1.5 MiB at 257 tokens with 2 MiB of
# second-level cache a core, and no different between 1 and 4 MiB at 4,096.
CACHED = 5 * 2**18


def all_at_once(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    counts: Sequence[int],
    tolerance: float,
    scale: float,
    log_sums: Tensor | None = None,
) -> Tensor:
    """A of all pairs in memory, in few calls."""
    (batch, heads, rows, _), keys = q.shape, k.shape[2]
    logits = product(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).mul_(scale).view(batch, heads, rows, keys)
    if bias is not None:
        bias = additive(bias)
        logits.add_(bias)
    attention = logits.softmax(-1)
    if log_sums is not None:
        log_sums.copy_(logits.logsumexp(-1))
    if bias is not None:  # a query that may attend to nothing pays nothing
        silent = bias.amax(-1, keepdim=True) == float("-inf")
        attention.masked_fill_(silent, 0.0)
        if log_sums is not None:
            log_sums.masked_fill_(silent.squeeze(-1), float("inf"))
    maps = attention.flatten(0, 1)
    mass = weights.flatten(0, 1).to(maps.dtype).unsqueeze(1)
    found = iterate(lambda mass: torch.bmm(mass, maps), mass, counts, tolerance)
    return torch.stack(found).view(len(found), batch, heads, keys)


def tiled(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    counts: Sequence[int],
    tolerance: float,
    scale: float,
    memory_limit: int,
    log_sums: Tensor | None = None,
) -> Tensor:
    """A for as many (image, head) pairs at a time as fit `memory_limit` bytes (at least one), all iterations on it."""
    dtype, rows, keys = precision(q), q.shape[2], k.shape[2]
    columns = _columns(k)
    work, row = _work(q, memory_limit), _row_bytes(q, k)
    if q.is_cuda and q.shape[0] * q.shape[1] * rows * row <= work:
        return all_at_once(q, k, weights, bias, counts, tolerance, scale, log_sums)
    pairs = max(1, work // (rows * row))
    block = rows if pairs > 1 else max(1, work // row)
    every = q.shape[0] * q.shape[1]
    buffer = q.new_empty(min(pairs, every), rows, columns, dtype=dtype)
    start = weights.flatten(0, 1).to(dtype).unsqueeze(1)
    out = q.new_empty(len(counts), every, 1, columns, dtype=dtype)
    for tile in tiles(q, k, bias, scale, pairs, columns, dtype):
        attention, sums = buffer[: len(tile.q)], _sums(log_sums, tile)
        for first in range(0, rows, block):
            part = slice(first, first + block)
            tile.attention(part, attention[:, part], None if sums is None else sums[:, part])
        push_into(out[:, tile.pairs], attention, start[tile.pairs], keys, counts, tolerance)
    return out.view(len(counts), *q.shape[:2], columns)[..., :keys].contiguous()


def matrix_free(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    counts: Sequence[int],
    tolerance: float,
    scale: float,
    memory_limit: int,
    log_sums: Tensor | None = None,
) -> Tensor:
    """A few rows of A at a time, multiplied and forgotten; the next iteration computes them again."""
    dtype, rows, keys = precision(q), q.shape[2], k.shape[2]
    columns = _columns(k)
    work, row = _work(q, memory_limit), _row_bytes(q, k)
    # Where a map exceeds the cache: as many pairs as there are threads, so that each works on its own.
    pairs = max(1, work // max(1, min(rows * row, work // _threads(q))))
    block = max(1, min(rows, work // (pairs * row)))
    buffer = q.new_empty(min(pairs, q.shape[0] * q.shape[1]) * block * columns, dtype=dtype)
    out = q.new_empty(len(counts), *q.shape[:2], keys, dtype=dtype)
    for tile in tiles(q, k, bias, scale, pairs, columns, dtype):
        sums = _sums(log_sums, tile)
        # Of a tile that may hold several images, another one would decide how this one is computed.
        quick = tile.exponentials() if pairs < 2 * q.shape[1] else None

        def push(
            mass: Tensor, tile: Tile = tile, sums: Tensor | None = sums, quick: Exponentials | None = quick
        ) -> Tensor:
            total = mass.new_zeros(len(tile.q), 1, columns)
            for start in range(0, rows, block):
                weight = mass[..., start : start + block]
                attention = buffer[: len(tile.q) * weight.shape[2] * columns].view(len(tile.q), -1, columns)
                part = slice(start, start + block)
                if quick is None:
                    tile.attention(part, attention, None if sums is None else sums[:, part])
                else:
                    each = quick.of(part, attention)
                    weight = weight / each.unsqueeze(1)
                    if sums is not None:
                        torch.log(each, out=sums[:, part])
                torch.baddbmm(total, weight, attention, out=total)
            return total[..., :keys]

        mass = flat(weights, tile.images, tile.heads, dtype).unsqueeze(1)
        _store(out, tile, iterate(push, mass, counts, tolerance))
    return out


def _store(out: Tensor, tile: Tile, masses: Sequence[Tensor]) -> None:
    """Put the masses [n, 1, N] of a tile's pairs into its part of out [C, B, H, N]."""
    for part, mass in zip(out[:, tile.images, tile.heads], masses, strict=True):
        part.copy_(mass.view_as(part))


def _sums(log_sums: Tensor | None, tile: Tile) -> Tensor | None:
    """The part [n, M] of log_sums [B, H, M] that is a tile's pairs', which lie side by side."""
    return None if log_sums is None else log_sums[tile.images, tile.heads].flatten(0, 1)


def _columns(k: Tensor) -> int:
    """Keys, on a CPU padded so that every map in a tile is aligned alike: the last bits of a product depend on it."""
    return -(-k.shape[2] // 16) * 16 if k.device.type == "cpu" else k.shape[2]


def _row_bytes(q: Tensor, k: Tensor) -> int:
    """Bytes that a row of the map takes at its peak."""
    return _columns(k) * precision(q).itemsize * (1 if q.device.type == "cpu" else 2)


def _threads(q: Tensor) -> int:
    return torch.get_num_threads() if q.device.type == "cpu" else 1


def _work(q: Tensor, memory_limit: int) -> int:
    """Bytes of the map to work on at a time."""
    return min(memory_limit, CACHED * torch.get_num_threads()) if q.device.type == "cpu" else memory_limit
