"""What a shorter sequence means for everything that is indexed by token, as tensor functions.

L tokens of a prompt become M, the same number for every sample: where samples keep different numbers, those with fewer
are padded on the left. `index` [B, M] is the position of each among the L, `valid` [B, M] is False for padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.kernels.merge import gather


def pack_left(keep: Tensor) -> tuple[Tensor, Tensor]:
    """(index, valid) of the tokens to keep, bool [B, L]; the device is waited for, as M is a shape."""
    length = int(keep.sum(1).max())
    order = keep.to(torch.int8).sort(dim=1, stable=True).indices  # the kept ones stand last, in order
    index = order[:, keep.shape[1] - length :]
    return index, gather(keep, index)


def narrow_mask(mask: Tensor, index: Tensor, valid: Tensor, past: int) -> Tensor:
    """An attention mask for the M tokens, behind `past` cached ones.

    mask: [B, past + L], or [B or 1, H or 1, L, K] with K >= past + L (a static cache has more), of bool or to be added.
    """
    batch, kept = index.shape
    if mask.ndim == 2:
        return torch.cat([mask[:, :past], gather(mask[:, past:], index) * valid.to(mask.dtype)], 1)
    rows = gather(mask.expand(batch, *mask.shape[1:]), index, dim=2)
    length = mask.shape[2]
    new = gather(rows[..., past : past + length], index, dim=3)
    hidden = ~valid[:, None, None]
    unused = rows[..., past + length :]
    # Removed tokens take no room in a static cache: behind the kept ones are as many empty places more.
    empty = rows.new_zeros(*rows.shape[:3], length - kept if unused.shape[-1] else 0)
    if mask.dtype == torch.bool:
        return torch.cat([rows[..., :past], new & ~hidden, unused, empty], -1)
    lowest = torch.finfo(mask.dtype).min
    return torch.cat([rows[..., :past], new.masked_fill(hidden, lowest), unused, empty + lowest], -1)


def narrow_positions(positions: Tensor, index: Tensor) -> Tensor:
    """Position ids [B or 1, L] or [R, B or 1, L] of the M tokens."""
    batch, several = index.shape[0], positions.ndim == 3
    rows = (positions if several else positions.unsqueeze(0)).expand(-1, batch, -1)
    kept = gather(rows.transpose(0, 1), index, dim=2).transpose(0, 1)
    return kept if several else kept[0]


def renumber(positions: Tensor, real: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [.., B, M] counted through from the prompt's first, and by how much what follows moves [.., B, 1].

    positions: [.., B or 1, L] before; the next token stood one behind the last of them. real: [B, L] tokens that are
    none of padding.
    """
    first = torch.where(real, positions, torch.iinfo(positions.dtype).max).amin(-1, keepdim=True)
    rank = (valid.cumsum(-1) - 1).clamp(min=0)
    counted = first + rank
    return counted, positions[..., -1:] - counted[..., -1:]


def spread(hidden: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """hidden [B, M, C] back to [B, L, C]: a token left out has the state of the last kept one before it (or the first).

    keep: [B, L].
    """
    before = keep.long().cumsum(1) - 1
    padding = (~valid).sum(1, keepdim=True)
    return gather(hidden, (before + padding).clamp(min=0).maximum(padding))


def causal_mask(seen: Tensor, queries: int) -> Tensor:
    """Bool [B, 1, Q, K] of causal attention for the last Q of K tokens, of which `seen` [B, K] may be attended to."""
    keys = seen.shape[1]
    place = torch.arange(keys, device=seen.device)
    return (place <= place[keys - queries :, None]) & seen[:, None, None]


def repad(mask: Tensor, valid: Tensor) -> Tensor:
    """A mask [B or 1, H or 1, Q, K], of bool or to be added, whose first P keys are the `valid` [B, P] entries of a
    pruned prompt; it was made by the padding of the whole prompt."""
    wide = valid[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    prompt = wide
    if mask.dtype != torch.bool:
        prompt = torch.zeros_like(wide, dtype=mask.dtype).masked_fill(~wide, torch.finfo(mask.dtype).min)
    return torch.cat([prompt, mask[..., valid.shape[1] :].expand(len(wide), -1, -1, -1)], -1)
