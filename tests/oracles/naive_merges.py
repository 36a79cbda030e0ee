"""pitome, tofu and diffrate by loops over the tokens of one image."""

import itertools
import math
from collections.abc import Sequence

import torch
from naive_methods import attention_score, closest, cosine, highest, mean_keys, merge_by_size, pairs_of, similar_pairs
from naive_vit import Place, Token

DEPTH = 12


def elu(value: float) -> float:
    return value if value > 0 else math.exp(value) - 1


def energies(keys: Sequence[Sequence[float]], margin: float) -> list[float]:
    """Mean over all tokens of elu(cos - margin)."""
    return [sum(elu(cosine(a, b) - margin) for b in keys) / len(keys) for a in keys]


def pitome(place: Place, *, margin: float = 0.75) -> list[Token]:
    """Protect informative tokens before merging (Tran et al., NeurIPS 2024)."""
    tokens, keys, removed = place.tokens, mean_keys(place), len(place.tokens) - place.keep
    energy = energies(keys, margin - margin * place.block / DEPTH)
    order = sorted(range(len(tokens)), key=lambda j: (-energy[j], j))
    protected: list[int] = []
    if place.block >= DEPTH / 2:
        protected = sorted(order[2 * removed :])
        order = order[: 2 * removed]
    ranked = sorted(energy, reverse=True)[: len(order) + 1]
    place.margins.extend((a - b) / abs(a) for a, b in itertools.pairwise(ranked))
    stay, groups = pairs_of(keys, sorted(order[0::2]), sorted(order[1::2]), removed, place.margins)
    return [tokens[j] for j in protected + stay] + [merge_by_size(tokens, b, a) for b, a in groups.items()]


def tofu(place: Place, *, merge_from: float = 0.5) -> list[Token]:
    """Token fusion (Kim et al., WACV 2024): ToMe's pairs, of which early blocks drop one, and late ones average both
    and make the average as long as the longest."""
    tokens = place.tokens
    stay, groups = similar_pairs(place)
    left = [tokens[a] for a in stay]
    for b, others in groups.items():
        if place.block < merge_from * DEPTH or not others:
            left.append(tokens[b])
            continue
        merged = merge_by_size(tokens, b, others)
        longest = max(tokens[j].hidden.norm().item() for j in [b, *others])
        merged.hidden = merged.hidden * (longest / merged.hidden.norm().item())
        left.append(merged)
    return left


# DiffRate's rates for DeiT-S at 2.9 GFLOPs: tokens left by pruning and then by merging in each block, the class token
# among them (Chen et al., ICCV 2023).
PRUNED = [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3]
MERGED = [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]


def pruned_share(block: int) -> float:
    """Of the tokens that a block removes, those that it drops before it merges."""
    entering = MERGED[block - 1] if block else 197
    left = min(entering, PRUNED[block], MERGED[block])
    return (entering - min(entering, PRUNED[block])) / (entering - left) if left < entering else 0.0


def diffrate(place: Place) -> list[Token]:
    """Prune the tail by class attention, then merge the least important that are left into the most similar of those
    that stay, with equal weights; what a token counts for in attention grows by similarity times size."""
    tokens, scores = place.tokens, attention_score(place)
    order = sorted(range(len(tokens)), key=lambda j: (-scores[j], j))
    removed = len(tokens) - place.keep
    middle = len(tokens) - round(pruned_share(place.block) * removed)
    for count in (place.keep, middle):
        highest(scores, count, place.margins)
    kept, merged = sorted(order[: place.keep]), order[place.keep : middle]
    hidden = [token.hidden.tolist() for token in tokens]
    groups: dict[int, list[tuple[int, float]]] = {j: [] for j in kept}
    for j in merged:
        best, similarity, lead = closest(hidden, j, kept)
        place.margins.append(lead)
        groups[best].append((j, similarity))
    left = []
    for j, others in groups.items():
        total = tokens[j].hidden + sum((tokens[i].hidden for i, _ in others), torch.zeros_like(tokens[j].hidden))
        members = [member for i in [j, *(i for i, _ in others)] for member in tokens[i].members]
        weight = tokens[j].size + sum(tokens[i].size * max(0.0, similarity) for i, similarity in others)
        left.append(Token(total / (1 + len(others)), tuple(sorted(members)), tokens[j].representative, weight))
    return left
