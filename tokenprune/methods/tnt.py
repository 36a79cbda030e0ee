"""TNT: noise in training stands for tokens that are dropped later (Rao, Jiang and Moyer, "Training Noise Token
Pruning", 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import is_number
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.merge import gather
from tokenprune.learning import Learned, Recipe, Shape
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, Stages, checked_places
from tokenprune.selection.mixtures import no_penalty
from tokenprune.selection.pairs import similar_to_important
from tokenprune.selection.top_k import keep_top_k

NOISE = 0.02
SIMILARITY = 0.32
RATE = 2e-3
"""Peak learning rate: the authors' 5e-4 for 512 images, of which a step of theirs takes 2048."""


class Alpha(nn.Module):
    """What a block learns: a weight [C], whose product with a token says how much it matters. The softmax over tokens,
    in which it is trained, knows no bias."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape.width))


def relevance(record: AttentionRecord) -> Tensor:
    """The logit of each prunable token, [B, n]: as the softmax over them orders them."""
    assert isinstance(record.learned, Alpha)
    weight = record.learned.weight.to(record.hidden.dtype)
    return (record.hidden @ weight)[:, record.num_prefix_tokens :]


def add_noise(record: AttentionRecord, *, noise: float) -> Tensor:
    """The hidden states [B, N, C] with noise on each prunable token, the less the larger its share alpha of the
    relevance: `noise` (1 - alpha) times a standard normal number and the standard deviation of the token's channels.

    The authors' code normalises all tokens first, by a norm that is not there in deployment. A frozen model was not
    trained with that; its next block's own norm sees the same ratio of token to noise without it.
    """
    assert isinstance(record.learned, Alpha)
    x, prefix = record.hidden, record.num_prefix_tokens
    body = x[:, prefix:]
    alpha = (body @ record.learned.weight.to(x.dtype)).softmax(1)
    spread = body.detach().std(-1, keepdim=True, correction=0)
    drawn = torch.randn_like(body) * spread * noise
    return torch.cat([x[:, :prefix], body + drawn * (1 - alpha).unsqueeze(-1)], 1)


def relevant_and_unlike(
    scores: Tensor | None, record: AttentionRecord, keep: int, *, similarity: float, seed: int
) -> Reduction:
    """Keep the tokens of the highest scores [B, n], and of these drop a share `similarity` of all that are removed: of
    a random half of them those that are most similar to one of the other half."""
    assert scores is not None
    redundant = min(round(similarity * (record.tokens - keep)), keep)
    if redundant == 0:
        return keep_top_k(scores, record, keep)
    first = keep_top_k(scores, record, keep + redundant).kept
    ordered, tokens = gather(scores, first), gather(record.hidden[:, record.num_prefix_tokens :], first)
    among = replace(record, origin=gather(record.origin, first))
    gone = similar_to_important(ordered, tokens, redundant, among, partition="random", seed=seed)
    stays = keep_top_k(torch.ones_like(ordered).scatter(1, gone, 0.0), among, keep)
    return Reduction(gather(first, stays.kept))


@dataclass(frozen=True)
class EarlyStages(Stages):
    """Stages behind the last three of the first five twelfths of the blocks (2, 3 and 4 of 12)."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        return super().places(layout) if self.at is not None else first_blocks(layout)[-3:]


def first_blocks(layout: Layout, at: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """`at`, or the first five twelfths of the blocks."""
    return tuple(range(max(1, round(layout.depth * 5 / 12)))) if at is None else checked_places(at, layout.depth)


def nothing_leaves(progress: float, dense: bool) -> float:
    """Share of what a budget removes that leaves in training."""
    return 0.0


def _peak(name: str, steps: int) -> float:
    return RATE


@register_method("tnt")
def tnt(
    *,
    rate: float = 0.8,
    places: tuple[int, ...] | None = None,
    similarity: float = SIMILARITY,
    noise: float = NOISE,
    seed: int = 0,
) -> Method:
    """Drop the tokens that bear most noise: a linear head in each block has learned which may.

    `tokenprune train MODEL --method tnt --flops 0.6` learns the heads with the model frozen. Noise is added by the
    trainer alone, and nothing leaves meanwhile, so that what is learned is for every budget. rate: share kept at each
    of `places`, by default behind blocks 2, 3 and 4 of 12; heads are learned for the first five (of another depth for
    as large a part). noise: its standard deviation in training, as a share of that of a token's channels, for a token
    without any relevance.

    similarity: the share of what leaves a place that is dropped for being like another token, after the least relevant
    ones: 25 of 78 in the paper's single place. With several places the paper drops 40 of 196 in front of the first
    block instead, where nothing leaves here. seed: of the halves that are compared.
    """
    if not is_number(similarity) or not 0 <= similarity <= 1:
        raise UnsupportedMethod(
            f"similarity of tnt is a share in [0, 1], got {similarity!r}; for example similarity={SIMILARITY:g}"
        )
    if not is_number(noise) or not noise > 0:
        raise UnsupportedMethod(f"noise of tnt is a positive number, got {noise!r}; for example noise={NOISE:g}")
    return Method(
        name="tnt",
        paper="Rao et al., Training Noise Token Pruning, 2024",
        schedule=EarlyStages(rate, places),
        score=relevance,
        select=partial(relevant_and_unlike, similarity=similarity, seed=seed),
        position="post",
        learned=Learned(
            part=Alpha,
            penalty=no_penalty,
            curriculum=nothing_leaves,
            rate=_peak,
            recipe=Recipe(epochs=40, batch_size=256, opt="adamw", weight_decay=0.05, smoothing=0.1),
            disturb=partial(add_noise, noise=noise),
            places=partial(first_blocks, at=places),
            bound=False,
        ),
    )
