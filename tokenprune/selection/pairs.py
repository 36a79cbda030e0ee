"""Selections by similar pairs."""

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.ragged import RaggedReduction
from tokenprune.reduction import Reduction
from tokenprune.selection.top_k import first_of, ranked


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
    every = torch.arange(record.tokens, device=record.origin.device).expand_as(record.origin)
    a, b = halves(every, first)
    return a, b


def halves(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Every second of the tokens x [B, n, ...], from `first` (0 or 1) on, and the others."""
    return x[:, first::2], x[:, 1 - first :: 2]


def merge_above(
    similarity: Tensor, match: Tensor, a: Tensor, b: Tensor, threshold: Tensor, least: int
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
    front = gather(a, rest) if others is None else torch.cat([others, gather(a, rest)], 1)
    return Reduction(
        kept=torch.cat([front, b], 1),
        moved=gather(a, merged),
        target=gather(match, merged) + front.shape[1],
    )


def similar_to_important(importance: Tensor, metric: Tensor, remove: int) -> Tensor:
    """Which `remove` tokens are redundant: True in [B, n] (Zero-TPrune's similarity stage, section 3.3).

    Sequential-U partition: the less important half of the tokens are candidates, each is compared with the more
    important half by the cosine of keys `metric` [B, n, D], and the candidates most similar to a partner go.
    importance: [B, n].
    """
    order = ranked(importance)
    half = order.shape[1] // 2
    strong, weak = order[:, : order.shape[1] - half], order[:, order.shape[1] - half :].sort(dim=1).values
    similarity, _ = cosine_match(gather(metric, weak), gather(metric, strong))
    gone = gather(weak, ranked(similarity)[:, :remove])
    return torch.zeros_like(importance, dtype=torch.bool).scatter(1, gone, True)
