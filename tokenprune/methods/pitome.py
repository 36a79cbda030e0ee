"""PiToMe: protect informative tokens before merging (Tran et al., "Accelerating Transformers with Spectrum-Preserving
Token Merging", NeurIPS 2024)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import is_number
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.kernels.pairwise import energy
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import HalfOfEveryBlock
from tokenprune.selection.pairs import merge_best
from tokenprune.selection.top_k import keep_all, ranked


@register_method("pitome")
def pitome(
    *, rate: float = 0.9, margin: float = 0.75, proportional: bool = True, places: tuple[int, ...] | None = None
) -> Method:
    """Merge tokens of high energy, which are many and alike, and protect the others.

    A token's energy is the mean over all tokens of elu(cosine of keys - margin). In the second half of the depth the
    2 r tokens of highest energy take turns to be a source or a destination, and each source goes to its most similar
    destination; in the first half all tokens take turns, and the r most similar pairs are merged.

    rate: share that leaves each block (0.9 for 12 blocks is about 40% of the FLOPs saved, where the paper's range
    starts). margin: in the first block; it falls to 0 behind the last (the published code's; the paper prints 0.9).
    proportional: add log(size) to the attention logits of a merged token; published versions differ in that.
    """
    if not (is_number(margin) and margin >= 0):
        raise UnsupportedMethod(f"margin is a cosine of 0 or more, got {margin!r}; for example margin=0.75")
    return Method(
        name="pitome",
        paper="Tran et al., PiToMe, NeurIPS 2024",
        schedule=HalfOfEveryBlock(rate, places),
        score=partial(cluster_energy, margin=margin),
        select=merge_high_energy,
        merges=True,
        proportional=proportional,
        needs=frozenset({"keys"}),
    )


def cluster_energy(record: AttentionRecord, margin: float) -> Tensor:
    """`energy` of keys, [B, n], at a margin that falls with depth."""
    return energy(record.metric, margin=margin * (1 - record.place / record.depth))


def merge_high_energy(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Merge n - `keep` tokens by energy [B, n] and the cosine of keys. The tokens that leave: those that are protected,
    the sources that stay, the destinations."""
    assert scores is not None
    if keep == record.tokens:
        return keep_all(record)
    order, removed, protected = ranked(scores), record.tokens - keep, None
    if 2 * record.place >= record.depth:
        protected = order[:, 2 * removed :].sort(dim=1).values
        order = order[:, : 2 * removed]
    a, b = (order[:, first::2].sort(dim=1).values for first in (0, 1))
    similarity, match = cosine_match(gather(record.metric, a), gather(record.metric, b))
    return merge_best(similarity, match, a, b, removed, protected)
