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
    metric, n = record.metric, record.tokens
    first = record.num_prefix_tokens % 2
    similarity, match = cosine_match(metric[:, first::2], metric[:, 1 - first :: 2])
    order = ranked(similarity)
    merged, rest = order[:, : n - keep], order[:, n - keep :].sort(dim=1).values
    b = torch.arange(1 - first, n, 2, device=metric.device).expand(metric.shape[0], -1)
    return Reduction(
        kept=torch.cat([torch.rsub(rest, first, alpha=-2), b], 1),  # first + 2 rest, in one operation
        moved=torch.rsub(merged, first, alpha=-2),
        target=match.gather(1, merged) + rest.shape[1],
    )


def similar_to_important(importance: Tensor, metric: Tensor, remove: int) -> Tensor:
    """Positions [B, remove] of redundant tokens (Zero-TPrune's similarity stage, section 3.3).

    Sequential-U partition: the less important half of the tokens are candidates, each is compared with the more
    important half by the cosine of keys `metric` [B, n, D], and the candidates most similar to a partner go.
    importance: [B, n].
    """
    order = ranked(importance)
    half = order.shape[1] // 2
    strong, weak = order[:, : order.shape[1] - half], order[:, order.shape[1] - half :].sort(dim=1).values
    similarity, _ = cosine_match(gather(metric, weak), gather(metric, strong))
    return weak.gather(1, ranked(similarity)[:, :remove])
