"""uniform, top_k, evit and tome by loops over the tokens of one image."""

import math
from collections.abc import Sequence

import torch
from naive_vit import Matrix, Place, Token


def highest(scores: Sequence[float], count: int, margins: list[float]) -> list[int]:
    """The positions of the `count` highest scores, ascending; of equal scores the lower position wins."""
    ranked = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    if 0 < count < len(scores):
        last_in, first_out = scores[ranked[count - 1]], scores[ranked[count]]
        margins.append((last_in - first_out) / max(abs(last_in), 1e-30))
    return sorted(ranked[:count])


def uniform(place: Place) -> list[Token]:
    n = len(place.tokens)
    return [place.tokens[math.floor((j + 0.5) * n / place.keep)] for j in range(place.keep)]


def attention_score(place: Place) -> list[float]:
    """For each patch token: what the class token pays it, or without one what all queries pay it, mean over heads."""
    heads = len(place.attention)
    scores = []
    for j in range(len(place.tokens)):
        column = place.prefix + j
        score = 0.0
        for head in place.attention:
            if place.class_token:
                score += head[0][column] / heads
            else:
                score += sum(row[column] for row in head) / len(head) / heads
        scores.append(score)
    return scores


def top_k(place: Place) -> list[Token]:
    return [place.tokens[j] for j in highest(attention_score(place), place.keep, place.margins)]


def evit(place: Place) -> list[Token]:
    scores = attention_score(place)
    kept = highest(scores, place.keep - 1, place.margins)
    fused = torch.zeros_like(place.tokens[0].hidden)
    members: list[int] = []
    for j, token in enumerate(place.tokens):
        if j not in kept:
            fused = fused + scores[j] * token.hidden
            members.extend(token.members)
    return [place.tokens[j] for j in kept] + [Token(fused, tuple(sorted(members)), None)]


def mean_keys(place: Place) -> list[list[float]]:
    """The key of each patch token, averaged over the heads."""
    return mean_of_heads(place, place.keys)


def mean_of_heads(place: Place, parts: Sequence[Matrix]) -> list[list[float]]:
    """What the heads have for each patch token, in the mean: parts [head][token][channel]."""
    heads = len(parts)
    channels = len(parts[0][0])
    return [
        [sum(head[place.prefix + j][c] for head in parts) / heads for c in range(channels)]
        for j in range(len(place.tokens))
    ]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def closest(keys: Sequence[Sequence[float]], a: int, candidates: Sequence[int]) -> tuple[int, float, float]:
    """The candidate most similar to `a` (of equals the first), its cosine, and its lead over the second."""
    best, best_similarity, second = -1, -math.inf, -math.inf
    for b in candidates:
        similarity = cosine(keys[a], keys[b])
        if similarity > best_similarity:
            best, best_similarity, second = b, similarity, best_similarity
        else:
            second = max(second, similarity)
    return best, best_similarity, best_similarity - second


def similar_pairs(place: Place) -> tuple[list[int], dict[int, list[int]]]:
    """ToMe's choice: the tokens of side A that stay, and for each of side B, in order, those of A that go to it."""
    removed, keys = len(place.tokens) - place.keep, mean_keys(place)
    side_a = [j for j in range(len(place.tokens)) if (j + place.prefix) % 2 == 0]
    side_b = [j for j in range(len(place.tokens)) if (j + place.prefix) % 2 == 1]
    assert removed <= len(side_a)
    assert side_b
    return pairs_of(keys, side_a, side_b, removed, place.margins)


def pairs_of(
    keys: Sequence[Sequence[float]], side_a: Sequence[int], side_b: Sequence[int], removed: int, margins: list[float]
) -> tuple[list[int], dict[int, list[int]]]:
    """The same between two sides: the `removed` tokens of A that are most similar to one of B go to that one."""
    partner = {a: closest(keys, a, side_b) for a in side_a}
    merged = [side_a[i] for i in highest([partner[a][1] for a in side_a], removed, margins)]
    margins.extend(partner[a][2] for a in merged)
    groups = {b: [a for a in merged if partner[a][0] == b] for b in side_b}
    return [a for a in side_a if a not in merged], groups


def merge_by_size(tokens: Sequence[Token], into: int, others: Sequence[int]) -> Token:
    """Token `into` with `others`, averaged by size."""
    group = [into, *others]
    hidden = torch.zeros_like(tokens[into].hidden)
    for j in group:
        hidden = hidden + tokens[j].size * tokens[j].hidden
    members = tuple(sorted(member for j in group for member in tokens[j].members))
    return Token(hidden / sum(tokens[j].size for j in group), members, tokens[into].representative)


def tome(place: Place) -> list[Token]:
    stay, groups = similar_pairs(place)
    return [place.tokens[a] for a in stay] + [merge_by_size(place.tokens, b, others) for b, others in groups.items()]
