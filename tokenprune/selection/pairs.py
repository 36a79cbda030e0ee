"""Selections by similar pairs."""

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.reduction import Reduction
from tokenprune.selection.top_k import ranked


def merge_similar_pairs(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Bipartite soft matching on keys (ToMe, Bolya et al., ICLR 2023, section 3 and appendix D).

    Tokens at even and odd places of the sequence form the sets A and B; each a in A has its most similar b in B, and
    the n - `keep` most similar pairs are merged into b. The tokens that leave: the rest of A, then B. Prefix tokens
    take part in no set, which for one class token is the original's split.
    """
    metric, n, batch = record.metric, record.tokens, record.origin.shape[0]
    first = record.num_prefix_tokens % 2
    a = torch.arange(first, n, 2, device=metric.device).expand(batch, -1)
    b = torch.arange(1 - first, n, 2, device=metric.device).expand(batch, -1)
    similarity, match = cosine_match(metric[:, first::2], metric[:, 1 - first :: 2])
    return merge_best(similarity, match, a, b, n - keep)


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
