"""Selections by similar pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.kernels.pairwise import nearest
from tokenprune.ragged import RaggedReduction
from tokenprune.reduction import Reduction
from tokenprune.scores.fixed import hashed_scores
from tokenprune.selection.top_k import first_of, ranked
from tokenprune.tables import positions


def merge_similar_pairs(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Bipartite soft matching on keys (ToMe, Bolya et al., ICLR 2023, section 3 and appendix D).

    Tokens at even and odd places of the sequence form the sets A and B; each a in A has its most similar b in B, and
    the n - `keep` most similar pairs are merged into b. The tokens that leave: the rest of A, then B. Prefix tokens
    take part in no set, which for one class token is the original's split.
    """
    a, b = alternating(record, record.num_prefix_tokens % 2)
    similarity, match = cosine_match(*halves(record.metric, record.num_prefix_tokens % 2))
    return merge_best(similarity, match, a, b, record.tokens - keep)


def alternating(record: AttentionRecord, first: int) -> tuple[Tensor, Tensor]:
    """Positions [B, M] and [B, n - M] of every second token, from `first` (0 or 1) on, and of the others."""
    every = positions(record.tokens, record.origin).expand_as(record.origin)
    a, b = halves(every, first)
    return a, b


def alternating_match(x: Tensor, record: AttentionRecord, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions a [B, M] and b [B, N] of every second token, from `first` (0 or 1) on, and of the others, N > 0; the
    cosine [B, M] of each a with its most similar b, of x [B, n, D], and which of b that is [B, M].

    Where images have fewer tokens than n (`record.alive`), a match is one of an image's own; the cosine is -inf of what
    is no token or has no other to be compared with.
    """
    a, b = alternating(record, first)
    left, right = halves(x, first)
    if record.alive is None:
        return a, b, *cosine_match(left, right)
    there, others = halves(record.alive > 0, first)
    similarity, match = cosine_match(left, torch.where(others.unsqueeze(-1), right, right[:, :1]))
    match = torch.where(gather(others, match), match, 0)  # as alike as the first, which stands in their places
    return a, b, similarity.masked_fill(~(there & others[:, :1]), float("-inf")), match


def surplus(record: AttentionRecord, keep: int) -> int | Tensor:
    """How many of an image's tokens are more than `keep`, [B, 1] where images have different numbers of them."""
    if record.alive is None:
        return max(0, record.tokens - keep)
    return ((record.alive > 0).sum(1, keepdim=True) - keep).clamp_min(0)


def halves(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Every second of the tokens x [B, n, ...], from `first` (0 or 1) on, and the others."""
    return x[:, first::2], x[:, 1 - first :: 2]


def merge_above(
    similarity: Tensor, match: Tensor, a: Tensor, b: Tensor, threshold: Tensor, least: int | Tensor
) -> RaggedReduction:
    """Merge the tokens of a [B, M] whose similarity [B, M] is at least the threshold [B, 1], and as many more of the
    next that `least` go, into their match, the place [B, M] of a token of b [B, N]; a and b are all tokens."""
    goes = first_of(similarity, (similarity >= threshold).sum(1, keepdim=True).clamp_min(least))
    own = torch.arange(a.shape[1] + b.shape[1], device=a.device).expand(a.shape[0], -1)
    return RaggedReduction(own.scatter(1, a, torch.where(goes, gather(b, match), a)))


def merge_best(
    similarity: Tensor, match: Tensor, a: Tensor, b: Tensor, removed: int, others: Tensor | None = None
) -> Reduction:
    """Merge the `removed` tokens of a [B, M] with the highest similarity [B, M] into their match, the place [B, M] of a
    token of b [B, N]. The tokens that leave: `others` [B, K], which are in neither set, the rest of a, then b."""
    order = ranked(similarity)
    merged, rest = order[:, :removed], order[:, removed:].sort(dim=1).values
    parts = [a.gather(1, rest), b] if others is None else [others, a.gather(1, rest), b]
    kept = torch.cat(parts, 1)
    return Reduction(
        kept=kept,
        moved=a.gather(1, merged),
        target=match.gather(1, merged) + (kept.shape[1] - b.shape[1]),
    )


Partition = Literal["sequential_u", "sequential_i", "alternate", "random", "none"]


def similar_to_important(
    importance: Tensor,
    x: Tensor,
    remove: int,
    record: AttentionRecord,
    *,
    metric: str = "cosine",
    partition: Partition = "sequential_u",
    seed: int = 0,
) -> Tensor:
    """Positions [B, remove] of redundant tokens (Zero-TPrune's similarity stage, section 3.3).

    Some of the tokens are candidates, each is compared with the others by the `metric` of x [B, n, D], and the
    candidates nearest to one of those go. Sequential-U partition: the candidates are the less important half. Others:
    the more important half ("sequential_i"), every second of all in order ("alternate"), a half drawn by `seed`
    ("random"), or each token, which is then compared with those that are more important ("none").
    importance: [B, n].
    """
    order = ranked(importance)
    if partition == "none":
        every = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.zeros_like(order).scatter(1, order, every)
        near, weak = nearest(x, x, metric=metric, ranks=(rank, rank))[0], every
    else:
        strong, weak = _parts(order, record, partition, seed)
        a, b = gather(x, weak), gather(x, strong)
        near = (cosine_match(a, b) if metric == "cosine" else nearest(a, b, metric=metric))[0]
    return weak.gather(1, ranked(near)[:, :remove])


def _parts(order: Tensor, record: AttentionRecord, partition: Partition, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of those that stay and, ascending, of the candidates, half of the tokens [B, n] in falling order."""
    half = order.shape[1] // 2
    if partition == "random":
        order = ranked(hashed_scores(record, seed))
    if partition == "sequential_i":
        strong, weak = order[:, half:], order[:, :half]
    elif partition == "alternate":
        strong, weak = halves(order, 0)
    else:
        strong, weak = order[:, : order.shape[1] - half], order[:, order.shape[1] - half :]
    return strong, weak.sort(dim=1).values
