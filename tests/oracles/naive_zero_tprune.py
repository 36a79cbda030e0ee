"""Zero-TPrune (arXiv 2305.17328) by loops: weighted PageRank on the full attention graph, head fusion, similarity."""

import math
from collections.abc import Mapping, Sequence

from naive_methods import closest, highest, mean_keys
from naive_vit import Matrix, Place, Token

PAPER_VARIANCE = (0.01, 0.7)


def paper_iterations(block: int, depth: int = 12) -> int:
    """30 in the first three blocks, 1 in the last three, 5 between."""
    if block < 3:
        return 30
    return 1 if block >= depth - 3 else 5


def start_scores(count: int, class_token: bool) -> list[float]:
    """Equal scores with sum 1, but sqrt(N) times as much for a class token."""
    weights = [1.0] * count
    if class_token:
        weights[0] = math.sqrt(count)
    return [weight / sum(weights) for weight in weights]


def pagerank(attention: Matrix, start: Sequence[float], iterations: int) -> list[float]:
    """s <- transpose(A) s: every token hands its score on to the tokens that it attends to."""
    scores = list(start)
    for _ in range(iterations):
        received = [0.0] * len(scores)
        for query, row in enumerate(attention):
            for key, weight in enumerate(row):
                received[key] += weight * scores[query]
        scores = received
    return scores


def head_variance(scores: Sequence[float]) -> float:
    """Population variance of one head's patch scores, rescaled to mean 1 over the patches."""
    mean = sum(scores) / len(scores)
    return sum((score / mean - 1) ** 2 for score in scores) / len(scores)


def passing_heads(heads: Sequence[Sequence[float]], variance: tuple[float, float]) -> list[int]:
    """eta: 1 for a head whose variance lies within the thresholds, else 0; all 1 where none does."""
    low, high = variance
    passed = [1 if low <= head_variance(scores) <= high else 0 for scores in heads]
    return passed if any(passed) else [1] * len(heads)


def fuse_heads(heads: Sequence[Sequence[float]], eta: Sequence[int]) -> list[float]:
    """Root mean square over the heads that count."""
    return [
        math.sqrt(sum(e * scores[i] ** 2 for e, scores in zip(eta, heads, strict=True)) / sum(eta))
        for i in range(len(heads[0]))
    ]


def importance(place: Place, iterations: int, variance: tuple[float, float], uniform_start: bool) -> list[float]:
    """The fused score of each patch token after `iterations` rounds on the graph of all tokens."""
    total = place.prefix + len(place.tokens)
    start = start_scores(total, place.class_token and not uniform_start)
    heads = [pagerank(attention, start, iterations)[place.prefix :] for attention in place.attention]
    for threshold in variance:
        if 0 < threshold < math.inf:
            place.margins.extend(abs(head_variance(scores) / threshold - 1) for scores in heads)
    return fuse_heads(heads, passing_heads(heads, variance))


def similar_tokens(
    scores: Sequence[float], keys: Sequence[Sequence[float]], count: int, margins: list[float]
) -> list[int]:
    """The `count` tokens of the less important half that are most similar to one of the more important half."""
    n = len(scores)
    more = highest(scores, n - n // 2, margins)
    less = [j for j in range(n) if j not in more]
    similarities = [closest(keys, a, more)[1] for a in less]
    return [less[i] for i in highest(similarities, count, margins)]


def zero_tprune(
    place: Place,
    *,
    iterations: int | Mapping[int, int] | None = None,
    similarity: int = 10,
    variance: tuple[float, float] = PAPER_VARIANCE,
    uniform_start: bool = False,
) -> list[Token]:
    if iterations is None:
        rounds = paper_iterations(place.block)
    elif isinstance(iterations, int):
        rounds = iterations
    else:
        rounds = iterations[place.block]
    n = len(place.tokens)
    removed = min(similarity, n - place.keep, n // 2)
    dropped: list[int] = []
    if removed:
        first_vote = importance(place, 1, variance, uniform_start)
        dropped = similar_tokens(first_vote, mean_keys(place), removed, place.margins)
    survivors = [j for j in range(n) if j not in dropped]
    scores = importance(place, rounds, variance, uniform_start)
    kept = highest([scores[j] for j in survivors], place.keep, place.margins)
    return [place.tokens[survivors[i]] for i in kept]
