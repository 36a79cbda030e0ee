"""Zero-TPrune (arXiv 2305.17328) by loops: weighted PageRank on the full attention graph, head fusion, similarity."""

import itertools
import math
from collections.abc import Mapping, Sequence

from naive_methods import cosine, highest, mean_of_heads
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


def feature_of(place: Place, feature: str) -> list[list[float]]:
    """What tokens are compared by: a mean over heads of the attention's parts, or hidden states in front of the block
    or behind it."""
    if feature == "x_pre":
        return [list(row) for row in place.entered]
    if feature == "x":
        return [token.hidden.tolist() for token in place.tokens]
    return mean_of_heads(place, {"key": place.keys, "query": place.queries, "value": place.values}[feature])


def closeness(a: Sequence[float], b: Sequence[float], metric: str) -> float:
    """The more, the nearer."""
    if metric == "cosine":
        return cosine(a, b)
    if metric == "dot":
        return sum(x * y for x, y in zip(a, b, strict=True))
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    if metric == "chebyshev":
        return -max(apart)
    order = {"manhattan": 1, "euclidean": 2, "minkowski_3": 3, "minkowski_4": 4, "minkowski_5": 5}[metric]
    return -(sum(d**order for d in apart) ** (1 / order))


def partners(order: Sequence[int], partition: str) -> dict[int, list[int]]:
    """The candidates for removal, ascending, each with the tokens that it is compared with; order: by importance."""
    n = len(order)
    half = n // 2
    if partition == "none":
        return {j: list(order[: order.index(j)]) for j in range(n)}
    weak, strong = {
        "sequential_u": (order[n - half :], order[: n - half]),
        "sequential_i": (order[:half], order[half:]),
        "alternate": (order[1::2], order[0::2]),
    }[partition]
    return {j: sorted(strong) for j in sorted(weak)}


def importance(
    place: Place, iterations: int, variance: tuple[float, float], uniform_start: bool, fusion: str = "rms"
) -> list[float]:
    """The fused score of each patch token after `iterations` rounds on the graph of all tokens."""
    total = place.prefix + len(place.tokens)
    start = start_scores(total, place.class_token and not uniform_start)
    heads = [pagerank(attention, start, iterations)[place.prefix :] for attention in place.attention]
    for threshold in variance:
        if 0 < threshold < math.inf:
            place.margins.extend(abs(head_variance(scores) / threshold - 1) for scores in heads)
    eta = passing_heads(heads, variance)
    if fusion == "mean":
        count = len(heads[0])
        return [sum(e * scores[i] for e, scores in zip(eta, heads, strict=True)) / sum(eta) for i in range(count)]
    return fuse_heads(heads, eta)


def similar_tokens(
    scores: Sequence[float],
    keys: Sequence[Sequence[float]],
    count: int,
    margins: list[float],
    *,
    partition: str = "sequential_u",
    metric: str = "cosine",
) -> list[int]:
    """The `count` candidates that are nearest to one of their partners; by default those of the less important half,
    their partners those of the more important one."""
    n = len(scores)
    order = sorted(range(n), key=lambda j: (-scores[j], j))
    if partition in ("sequential_u", "sequential_i"):
        highest(scores, n - n // 2 if partition == "sequential_u" else n // 2, margins)
    else:  # every exchange in the order matters
        margins.extend((scores[i] - scores[j]) / scores[i] for i, j in itertools.pairwise(order))
    candidates = partners(order, partition)
    near = []
    for a, others in candidates.items():
        near.append(max((closeness(keys[a], keys[b], metric) for b in others), default=-math.inf))
    return [list(candidates)[i] for i in highest(near, count, margins)]


def zero_tprune(
    place: Place,
    *,
    iterations: int | Mapping[int, int] | None = None,
    similarity: int = 10,
    variance: tuple[float, float] = PAPER_VARIANCE,
    uniform_start: bool = False,
    feature: str = "key",
    metric: str = "cosine",
    partition: str = "sequential_u",
    fusion: str = "rms",
) -> list[Token]:
    if iterations is None:
        rounds = paper_iterations(place.block)
    elif isinstance(iterations, int):
        rounds = iterations
    else:
        rounds = iterations[place.block]
    n = len(place.tokens)
    removed = min(similarity, n - place.keep, n - 1 if partition == "none" else n // 2)
    dropped: list[int] = []
    if removed:
        first_vote = importance(place, 1, variance, uniform_start, fusion)
        features = feature_of(place, feature)
        dropped = similar_tokens(first_vote, features, removed, place.margins, partition=partition, metric=metric)
    survivors = [j for j in range(n) if j not in dropped]
    scores = importance(place, rounds, variance, uniform_start, fusion)
    kept = highest([scores[j] for j in survivors], place.keep, place.margins)
    return [place.tokens[survivors[i]] for i in kept]
