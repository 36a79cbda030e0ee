"""Facility location: the tokens that represent all others best, and attention to them (ToMA, Lu et al., ICML 2025)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.merge import gather
from tokenprune.reduction import Reduction


def greedy_facilities(x: Tensor, count: int) -> Tensor:
    """`count` of the tokens x [B, n, C], as [B, count] in the order of choice: each is the one that adds most to
    f(D) = sum_i max_{j in D} cos(x_i, x_j). The map of similarities is held, so n is a tile's.

    Two tokens that cover nothing but each other add the same, so gains are rounded (to 1/1024): without that the last
    bit of a product, which depends on the batch, would decide.
    """
    unit = functional.normalize(x.float(), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    covered = similarity.new_full(x.shape[:2], -1.0)  # the least cosine
    taken = torch.zeros_like(covered)
    chosen = []
    for _ in range(count):
        gain = (similarity - covered.unsqueeze(-1)).relu_().sum(1).mul_(1024).round_() - taken
        best = gain.argmax(-1, keepdim=True)
        chosen.append(best)
        covered = torch.maximum(covered, gather(similarity, best).squeeze(1))
        taken = taken.scatter(1, best, float("inf"))
    return torch.cat(chosen, 1)


def tiles_of(grid: tuple[int, int], down: int, across: int, device: torch.device) -> list[Tensor]:
    """Positions of the tokens of each of down x across tiles of a grid, as equal as it goes."""
    rows, columns = grid
    place = torch.arange(rows * columns, device=device).view(rows, columns)
    return [
        place[i * rows // down : (i + 1) * rows // down, j * columns // across : (j + 1) * columns // across].flatten()
        for i in range(down)
        for j in range(across)
    ]


def facility_destinations(record: AttentionRecord, keep: int, tiles: int) -> Tensor:
    """[B, keep] positions, rising: the facilities of each of tiles x tiles parts of the grid, in proportion to its
    size."""
    assert record.grid is not None
    batch, rows, columns = record.hidden.shape[0], *record.grid
    parts = tiles_of(record.grid, min(tiles, rows), min(tiles, columns), record.hidden.device)
    alike: dict[tuple[int, int], list[Tensor]] = {}  # by size and destinations: these are one batch
    done, before = 0, 0
    for part in parts:
        done += part.shape[0]
        quota = keep * done // record.tokens - before
        before += quota
        alike.setdefault((part.shape[0], quota), []).append(part)
    chosen = []
    for (size, quota), tiles_alike in alike.items():
        place = torch.stack(tiles_alike)
        x = record.hidden[:, place.flatten()].reshape(batch * len(place), size, -1)
        found = greedy_facilities(x, quota) if quota else place.new_empty(len(x), 0)
        chosen.append(gather(place.repeat(batch, 1), found).view(batch, -1))
    return torch.cat(chosen, 1).sort(dim=1).values


def attend_to_destinations(destinations: Tensor, record: AttentionRecord, temperature: float) -> Reduction:
    """Merging by attention: every token is shared out over the destinations [B, K] by a softmax of its similarity to
    them (cosines over `temperature`), and a merged token is the average of all, weighted by these shares."""
    unit = functional.normalize(record.hidden.float(), dim=-1)
    shares = (gather(unit, destinations) @ unit.transpose(1, 2) / temperature).softmax(1)
    return Reduction(destinations, matrix=shares / shares.sum(-1, keepdim=True).clamp_min(1e-12))
