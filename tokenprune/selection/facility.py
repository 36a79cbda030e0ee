"""Facility location: the tokens that represent all others best, and attention to them (ToMA, Lu et al., ICML 2025)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.merge import gather
from tokenprune.reduction import Reduction
from tokenprune.selection.tiles import Tiling
from tokenprune.tile_matrix import TileMatrix


def greedy_facilities(x: Tensor, count: int, outside: Tensor | None = None) -> Tensor:
    """`count` of the tokens x [B, n, C], as [B, count] in the order of choice: each is the one that adds most to
    f(D) = sum_i max_{j in D} cos(x_i, x_j). The map of similarities is held, so n is a tile's. outside: [B, n] what is
    no token, neither chosen nor to be represented while there are others.

    Two tokens that cover nothing but each other add the same, so gains are rounded (to 1/1024): without that the last
    bit of a product, which depends on the batch, would decide.
    """
    unit = functional.normalize(x.float(), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    covered = similarity.new_full(x.shape[:2], -1.0)  # the least cosine
    taken = torch.zeros_like(covered)
    if outside is not None:
        covered = covered.masked_fill(outside, 2.0)  # more than any cosine
        taken = taken.masked_fill(outside, float("inf"))
    chosen = []
    for _ in range(count):
        gain = (similarity - covered.unsqueeze(-1)).relu_().sum(1).mul_(1024).round_() - taken
        best = gain.argmax(-1, keepdim=True)
        chosen.append(best)
        covered = torch.maximum(covered, gather(similarity, best).squeeze(1))
        taken = taken.scatter(1, best, float("inf"))
    return torch.cat(chosen, 1)


def facility_destinations(record: AttentionRecord, tiling: Tiling) -> Tensor:
    """[B, K] positions: the facilities of each tile, one tile's after the other's."""
    members, outside = tiling.members(record.origin), tiling.outside(record.origin)
    batch, (tiles, m) = record.hidden.shape[0], outside.shape
    x = record.hidden.index_select(1, members).view(batch * tiles, m, -1)
    found = greedy_facilities(x, max(tiling.quotas), outside.repeat(batch, 1))
    places = members.view(tiles, m).repeat(batch, 1).gather(1, found).view(batch, -1)
    return places.index_select(1, tiling.rows(record.origin))


def attend_to_destinations(destinations: Tensor, record: AttentionRecord, temperature: float) -> Reduction:
    """Merging by attention: every token is shared out over the destinations [B, K] by a softmax of its similarity to
    them (cosines over `temperature`), and a merged token is the average of all, weighted by these shares."""
    unit = functional.normalize(record.hidden.float(), dim=-1)
    shares = (gather(unit, destinations) @ unit.transpose(1, 2) / temperature).softmax(1)
    return Reduction(destinations, matrix=shares / shares.sum(-1, keepdim=True).clamp_min(1e-12))


def attend_within_tiles(destinations: Tensor, record: AttentionRecord, temperature: float, tiling: Tiling) -> Reduction:
    """The same with every token shared out over the destinations of its own tile alone, as `facility_destinations`
    chose them."""
    like = record.origin
    members, slots, rows, filled = tiling.members(like), tiling.slots(like), tiling.rows(like), tiling.filled(like)
    outside = tiling.outside(like)
    batch, (tiles, m), k = record.hidden.shape[0], outside.shape, max(tiling.quotas)
    unit = functional.normalize(record.hidden.float(), dim=-1)
    inside = unit.index_select(1, members).view(batch * tiles, m, -1)
    chosen = gather(unit, destinations).index_select(1, filled).view(batch * tiles, k, -1)
    logits = (chosen @ inside.transpose(1, 2)).view(batch, tiles, k, m) / temperature
    missing = torch.ones_like(filled, dtype=torch.bool).index_fill(0, rows, False).view(tiles, k, 1)
    shares = logits.masked_fill(missing, float("-inf")).softmax(2)
    shares = shares.masked_fill(outside.unsqueeze(1), 0.0).flatten(0, 1)
    # No view of another tensor, by whose shape a compiler would tell graphs apart as well.
    weights = shares / shares.sum(-1, keepdim=True).clamp_min(1e-12)
    return Reduction(destinations, tiles=TileMatrix(weights, members, slots, rows, filled))
