"""Pruning one more token by loops over the tokens of one image (Eliopoulos et al., WACV 2025, section 4)."""

import math
from collections.abc import Sequence

import torch
from naive_methods import highest
from naive_vit import Place, Token


def scores_of(place: Place) -> list[float]:
    """What all patches pay a patch, of the heads the one that pays most, over the largest such sum; and the softmax
    over all tokens of the sum over channels of the value, of the heads the largest in each channel."""
    p, n, heads = place.prefix, len(place.tokens), range(len(place.attention))
    received = [sum(max(place.attention[h][p + i][p + j] for h in heads) for i in range(n)) for j in range(n)]
    channels = range(len(place.values[0][0]))
    lengths = [sum(max(place.values[h][t][c] for h in heads) for c in channels) for t in range(p + n)]
    exponents = [math.exp(length - max(lengths)) for length in lengths]
    return [received[j] / max(received) + exponents[p + j] / sum(exponents) for j in range(n)]


def pomt(place: Place) -> list[Token]:
    scores = scores_of(place)
    kept = highest(scores, place.keep - 1, place.margins)
    others = [token for j, token in enumerate(place.tokens) if j not in kept]
    mean = sum((token.hidden for token in others), torch.zeros_like(others[0].hidden)) / len(others)
    members = tuple(sorted(member for token in others for member in token.members))
    return [place.tokens[j] for j in kept] + [Token(mean, members, None)]


def best_count(tokens: Sequence[int], seconds: Sequence[float], quality: Sequence[float], alpha: float) -> int:
    """The number of tokens of most utility: alpha (1 - time over the longest) + (1 - alpha) quality over the best."""
    utility = [
        alpha * (1 - s / max(seconds)) + (1 - alpha) * q / max(quality) for s, q in zip(seconds, quality, strict=True)
    ]
    return tokens[utility.index(max(utility))]
