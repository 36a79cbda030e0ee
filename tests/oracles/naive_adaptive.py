"""saint and algm by loops over the tokens of one image: each image decides for itself how many tokens go."""

import math
from collections.abc import Callable, Sequence

import tiny_models
from naive_methods import closest, cosine, highest, mean_keys, merge_by_size
from naive_vit import Place, Token


def saint(place: Place, *, threshold: float = 0.75, neighbours: int = 5, gamma: float = 10.0) -> list[Token]:
    """Similarity-aware token dropping (Jeddi et al., 2025): of every second token drop as many as have enough near
    neighbours among the others, those of the highest score."""
    keys, n = mean_keys(place), len(place.tokens)
    candidates, others = range(0, n, 2), range(1, n, 2)
    if not others:
        return list(place.tokens)
    enough, scores = 0, []
    for a in candidates:
        cosines = [cosine(keys[a], keys[b]) for b in others]
        near = [c for c in cosines if c >= threshold]
        place.margins.append(min(abs(c - threshold) for c in cosines))
        enough += len(near) >= neighbours
        if near:
            scores.append(len(near) * math.exp(gamma * (sum(near) / len(near) - threshold)))
        else:
            scores.append(sum(cosines) / len(cosines))
    removed = max(enough, n - place.keep)
    gone = {candidates[i] for i in highest(scores, removed, place.margins)}
    return [token for j, token in enumerate(place.tokens) if j not in gone]


def in_order(tokens: Sequence[Token], groups: dict[int, list[int]]) -> list[Token]:
    """What is left, in the order of the tokens that others are merged into."""
    gone = {j for others in groups.values() for j in others}
    left = []
    for j, token in enumerate(tokens):
        if j not in gone:
            left.append(merge_by_size(tokens, j, groups[j]) if j in groups else token)
    return left


def pool_windows(place: Place, threshold: float, grid: tuple[int, int]) -> list[Token]:
    """Windows of 2 x 2 whose tokens are alike, by the mean cosine of their pairs, become one token, the last."""
    rows, columns = grid
    assert len(place.tokens) == rows * columns
    hidden = [token.hidden.tolist() for token in place.tokens]
    windows, likeness = [], []
    for row in range(0, rows - 1, 2):
        for column in range(0, columns - 1, 2):
            first = row * columns + column
            window = [first, first + 1, first + columns, first + columns + 1]
            pairs = [cosine(hidden[i], hidden[j]) for i in window for j in window if i != j]
            windows.append(window)
            likeness.append(sum(pairs) / len(pairs))
            place.margins.append(abs(likeness[-1] - threshold))
    alike = [i for i, mean in enumerate(likeness) if mean >= threshold]
    needed = math.ceil((len(place.tokens) - place.keep) / 3)
    if needed > len(alike):
        alike = highest(likeness, needed, place.margins)
    return in_order(place.tokens, {windows[i][3]: windows[i][:3] for i in alike})


def merge_alike(place: Place) -> list[Token]:
    """Of every second token those go to the most similar of the others that are as similar as the image's pairs are in
    the mean, and a standard deviation over the number of the layer more."""

    def threshold(best: list[float]) -> float:
        mean = sum(best) / len(best)
        deviation = math.sqrt(sum((b - mean) ** 2 for b in best) / (len(best) - 1)) if len(best) > 1 else math.inf
        return mean + deviation / (place.block + 1)

    return merge_from(place, [token.hidden.tolist() for token in place.tokens], threshold)


def merge_from(
    place: Place, compared: Sequence[Sequence[float]], threshold_of: Callable[[list[float]], float]
) -> list[Token]:
    """Of every second token those whose most similar one of the others is at least as similar as the threshold go to
    it, and the next ones as far as the bound asks for."""
    side_a = [j for j in range(len(compared)) if (j + place.prefix) % 2 == 0]
    side_b = [j for j in range(len(compared)) if (j + place.prefix) % 2 == 1]
    partner = {a: closest(compared, a, side_b) for a in side_a}
    best = [partner[a][1] for a in side_a]
    threshold = threshold_of(best)
    place.margins.extend(abs(b - threshold) for b in best)
    removed = max(sum(b >= threshold for b in best), len(compared) - place.keep)
    merged = [side_a[i] for i in highest(best, removed, place.margins)]
    place.margins.extend(partner[a][2] for a in merged)
    return in_order(place.tokens, {b: [a for a in merged if partner[a][0] == b] for b in side_b})


def adaptive_tome(place: Place, *, threshold: float) -> list[Token]:
    """ToMe (Bolya et al., ICLR 2023) with a threshold for the cosine of keys."""
    return merge_from(place, mean_keys(place), lambda _: threshold)


def algm(place: Place, *, threshold: float = 0.88, grid: tuple[int, int] = tiny_models.GRID) -> list[Token]:
    """Adaptive local-then-global merging (Norouzi et al., CVPR 2024): windows in the first block, pairs later."""
    return pool_windows(place, threshold, grid) if place.block == 0 else merge_alike(place)
