"""Adaptive token sampling by loops over the tokens of one image (Fayyaz et al., ECCV 2022, sections 3.1 and 3.2)."""

import math

from naive_methods import attention_score
from naive_vit import Place, Token


def significance(place: Place) -> list[float]:
    """Attention of the class token times the length of the value over all heads; they sum to one."""
    scores = []
    for j, attention in enumerate(attention_score(place)):
        square = sum(channel * channel for head in place.values for channel in head[place.prefix + j])
        scores.append(attention * math.sqrt(square))
    total = sum(scores)
    return [score / total for score in scores]


def ats(place: Place) -> list[Token]:
    scores = significance(place)
    order = sorted(range(len(scores)), key=lambda j: (scores[j], j))
    line, total = [], 0.0
    for j in order:
        total += scores[j]
        line.append(total)
    line = [(value - line[0]) / (line[-1] - line[0]) for value in line]
    first = min(value for value in line if value > 0)
    sampled = set()
    for i in range(place.keep):
        value = 1.0 if place.keep == 1 else first + i * (1 - first) / (place.keep - 1)
        distances = sorted((abs(value - other), position) for position, other in enumerate(line))
        sampled.add(order[distances[0][1]])
        place.margins.append(distances[1][0] - distances[0][0])
    return [place.tokens[j] for j in sorted(sampled)]
