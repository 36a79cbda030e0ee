"""TNT's relevance, similarity stage and noise, and Token Cropr's scores and auxiliary losses, by loops.

Written from Rao et al., "Training Noise Token Pruning" (2024), and Bergner et al., "Token Cropr" (CVPR 2025). Learned
tensors are given by name, in float64. Nothing here comes from the package under test.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from naive_learned import gelu, layer_norm
from naive_methods import highest
from naive_vit import Place, Token
from torch import Tensor

Learned = Mapping[str, Tensor]


def product(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def cropr(place: Place, learned: Mapping[int, Learned]) -> list[Token]:
    """The tokens whose products with all queries add up to most."""
    queries = learned[place.block]["queries"]
    scores = [sum(product(query, token.hidden) for query in queries) for token in place.tokens]
    return [place.tokens[j] for j in highest(scores, place.keep, place.margins)]


def shares(hidden: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """The softmax over tokens of what a linear head says of each."""
    powers = [torch.exp(x @ weight) for x in hidden]
    return [power / sum(powers) for power in powers]


def tnt(
    place: Place, learned: Mapping[int, Learned], alike: int, candidates: Callable[[int, Sequence[int]], Sequence[int]]
) -> list[Token]:
    """The `alike` most similar of (block, patches) -> the candidates among them go from the most relevant tokens, so
    that `keep` are left."""
    alpha = [a.item() for a in shares([t.hidden for t in place.tokens], learned[place.block]["weight"])]
    tokens = [place.tokens[j] for j in highest(alpha, place.keep + alike, place.margins)]
    weak = candidates(place.block, [t.representative for t in tokens])
    nearest = []
    for j in weak:
        others = [t for k, t in enumerate(tokens) if k not in weak]
        own = tokens[j].hidden
        nearest.append(
            max(product(own, t.hidden) / math.sqrt(product(own, own) * product(t.hidden, t.hidden)) for t in others)
        )
    gone = [weak[i] for i in highest(nearest, alike, place.margins)]
    return [token for j, token in enumerate(tokens) if j not in gone]


def noisy(x: Tensor, prefix: int, weight: Tensor, drawn: Tensor, noise: float) -> Tensor:
    """Tokens [N, C] with `drawn` [n, C] added: by the share that a token has not, and by its own spread."""
    body = x[prefix:]
    alpha, rows = shares(list(body), weight), [x[j] for j in range(prefix)]
    for j, token in enumerate(body):
        mean = sum(token.detach()) / len(token)
        spread = math.sqrt(sum((value - mean) ** 2 for value in token.detach()) / len(token))
        rows.append(token + noise * (1 - alpha[j]) * spread * drawn[j])
    return torch.stack(rows)


def auxiliary_loss(tokens: Tensor, learned: Learned, labels: Sequence[int]) -> Tensor:
    """Cross-entropy, in the mean over its queries, of what each reads from the tokens [N, C] of an image."""
    losses = []
    for query, label in zip(learned["queries"], labels, strict=True):
        powers = [torch.exp(query @ x / math.sqrt(len(x))) for x in tokens]
        read = sum(power * x for power, x in zip(powers, tokens, strict=True)) / sum(powers)
        hidden = layer_norm(read, learned["norm.weight"], learned["norm.bias"])
        hidden = gelu(learned["mlp.0.weight"] @ hidden + learned["mlp.0.bias"])
        read = read + learned["mlp.2.weight"] @ hidden + learned["mlp.2.bias"]
        read = layer_norm(read, learned["head_norm.weight"], learned["head_norm.bias"])
        logits = learned["head.weight"] @ read + learned["head.bias"]
        losses.append(torch.log(sum(torch.exp(logits))) - logits[label])
    return sum(losses) / len(losses)
