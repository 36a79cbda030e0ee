"""Scores that look at no content: the baselines that a method must beat."""

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.tables import table

# Odd constants of an integer mixer (finaliser of MurmurHash3, 32 bits held in 64).
_MIX = (0x85EBCA6B, 0xC2B2AE35)
_MASK = 0xFFFFFFFF
_TOKEN = 0x9E3779B1


def hashed_scores(record: AttentionRecord, seed: int, each_step: bool = False) -> Tensor:
    """A pseudo-random score of each token from (seed, place, original patch), and `each_step` of a denoising
    run, [B, n], in [0, 1).

    Stateless, so that the global generator is untouched, an image's tokens do not depend on its batch mates, and it
    compiles and exports.
    """
    batch = record.origin.shape[0]
    # Where all images have one row of origins, as in a denoiser, its scores are worked out once.
    origin = record.origin[:1] if batch > 1 and record.origin.stride(0) == 0 else record.origin
    # The mask changes nothing but the compiler's arithmetic: it counts an index times a number in 32 bits.
    h = (origin & _MASK) * _TOKEN + _salt(seed, record.place)
    return _mixed(h, record.step if each_step else None).expand(batch, -1)


def hashed_scores_of_peers(record: AttentionRecord, seed: int) -> Tensor:
    """Those of all `peers` of a denoiser's record at its step, [places, n], each the same for all images."""
    salted = table(_salted, record.tokens, seed, record.peers or (record.place,), like=record.origin)
    return _mixed(salted, record.step)


def _salt(seed: int, place: int) -> int:
    return (seed * 1000003 + place * 7919 + 12345) & _MASK


def _salted(tokens: int, seed: int, places: tuple[int, ...], device: torch.device) -> Tensor:
    salts = torch.tensor([_salt(seed, place) for place in places], device=device)
    return torch.arange(tokens, device=device) * _TOKEN + salts.unsqueeze(1)


def _mixed(h: Tensor, step: Tensor | None) -> Tensor:
    if step is not None:
        h = h + step * 0x2545F491
    h = h & _MASK
    for constant in _MIX:
        h = ((h ^ (h >> 16)) * constant) & _MASK
    return (h ^ (h >> 13)).to(torch.float64) / 2**32
