"""k_medoids and dpc_knn by loops over the tokens of one image.

K-medoids is weighted (Marin et al., "Token Pooling in Vision Transformers", section 3.3), its weights and first centres
are the attention that a token receives (Haurum et al., "Which Tokens to Use?"). DPC-KNN: Du et al., "Study on density
peaks clustering based on k-nearest neighbors", as in "Which Tokens to Use?".
"""

import itertools
import math
from collections.abc import Sequence

import torch
from naive_methods import highest
from naive_vit import Place, Token


def received(place: Place) -> list[float]:
    """What all queries of all heads pay each patch token, those of the prefix included."""
    return [
        sum(row[place.prefix + j] for head in place.attention for row in head) / len(place.attention)
        for j in range(len(place.tokens))
    ]


def distance(a: Token, b: Token) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.hidden.tolist(), b.hidden.tolist(), strict=True)))


def distances(place: Place) -> list[list[float]]:
    """[i][j], computed in one piece, as `distance` of every pair would take minutes."""
    hidden = torch.stack([token.hidden for token in place.tokens])
    return (hidden[:, None] - hidden[None]).square().sum(-1).sqrt().tolist()


def assign(apart: Sequence[Sequence[float]], centres: Sequence[int], margins: list[float]) -> list[int]:
    """The nearest of `centres` (ascending; of equals the first) for each token; a centre belongs to itself."""
    found = []
    for j, row in enumerate(apart):
        ordered = sorted(centres, key=lambda c: (row[c], c))
        if j not in centres and len(ordered) > 1:
            margins.append((row[ordered[1]] - row[ordered[0]]) / max(row[ordered[1]], 1e-30))
        found.append(j if j in centres else ordered[0])
    return found


def k_medoids(place: Place, *, iterations: int = 3) -> list[Token]:
    apart, weights = distances(place), received(place)
    centres = highest(weights, place.keep, place.margins)
    for _ in range(iterations):
        cluster = assign(apart, centres, place.margins)
        moved = []
        for centre in centres:
            members = [j for j, own in enumerate(cluster) if own == centre]
            costs = {i: sum(weights[j] * apart[i][j] for j in members) for i in members}
            ordered = sorted(members, key=lambda i: (costs[i], i))
            if len(ordered) > 2:  # of two members the costs are those of one pair
                place.margins.append((costs[ordered[1]] - costs[ordered[0]]) / max(costs[ordered[1]], 1e-30))
            elif len(ordered) == 2:
                place.margins.append(abs(weights[ordered[0]] / weights[ordered[1]] - 1))
            moved.append(ordered[0])
        centres = sorted(moved)
    return [place.tokens[j] for j in centres]


def densities(apart: Sequence[Sequence[float]], channels: int, neighbours: int) -> list[float]:
    """exp(- mean squared distance to the nearest `neighbours`, of which a token is itself one), distances over the root
    of the channels."""
    nearest = [sorted(row)[:neighbours] for row in apart]
    return [math.exp(-sum(d * d for d in row) / len(row) / channels) for row in nearest]


def peaks(apart: Sequence[Sequence[float]], density: Sequence[float], count: int, margins: list[float]) -> list[int]:
    """The tokens whose density times distance to the nearest denser one is highest; the densest is one of them."""
    score = []
    for i, row in enumerate(apart):
        denser = [row[j] for j in range(len(row)) if (-density[j], j) < (-density[i], i)]
        score.append(density[i] * min(denser) if denser else math.inf)
    ordered = sorted(density)
    margins.extend((b - a) / b for a, b in itertools.pairwise(ordered) if b > 0)
    finite = sorted((s for s in score if s < math.inf), reverse=True)
    if 1 < count < len(score):
        margins.append((finite[count - 2] - finite[count - 1]) / finite[count - 2])
    return highest(score, count, [])


def dpc_knn(place: Place, *, neighbours: int = 5) -> list[Token]:
    tokens, apart = place.tokens, distances(place)
    density = densities(apart, len(tokens[0].hidden), neighbours)
    centres = peaks(apart, density, place.keep, place.margins)
    cluster = assign(apart, centres, place.margins)
    merged = []
    for centre in centres:
        members = [j for j, own in enumerate(cluster) if own == centre]
        hidden = torch.zeros_like(tokens[0].hidden)
        for j in members:
            hidden = hidden + tokens[j].hidden
        patches = tuple(sorted(patch for j in members for patch in tokens[j].members))
        merged.append(Token(hidden / len(members), patches, tokens[centre].representative))
    return merged
