"""Scores that look at no content: the baselines that a method must beat."""

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord

# Odd constants of an integer mixer (finaliser of MurmurHash3, 32 bits held in 64).
_MIX = (0x85EBCA6B, 0xC2B2AE35)
_MASK = 0xFFFFFFFF


def hashed_scores(record: AttentionRecord, seed: int, each_step: bool = False) -> Tensor:
    """A pseudo-random score of each token from (seed, place, original patch), and `each_step` of a denoising
    run, [B, n], in [0, 1).

    Stateless, so that the global generator is untouched, an image's tokens do not depend on its batch mates, and it
    compiles and exports.
    """
    batch = record.origin.shape[0]
    # Where all images have one row of origins, as in a denoiser, its scores are worked out once.
    origin = record.origin[:1] if batch > 1 and record.origin.stride(0) == 0 else record.origin
    h = origin * 0x9E3779B1 + ((seed * 1000003 + record.place * 7919 + 12345) & _MASK)
    if each_step and record.step is not None:
        h = h + record.step * 0x2545F491
    h = h & _MASK
    for constant in _MIX:
        h = ((h ^ (h >> 16)) * constant) & _MASK
    return ((h ^ (h >> 13)).to(torch.float64) / 2**32).expand(batch, -1)
