"""FoPru: focal pruning by the significance that the visual encoder gives to its tokens (Jiang et al., 2024)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.merge import gather
from tokenprune.lvlm.recipe import AfterTower
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.attention import attention_received, attention_to_class
from tokenprune.selection.top_k import keep_top_k, ranked


@register_method("fopru")
def fopru(
    *, rate: float = 0.25, strategy: Literal["rank", "row"] = "rank", query: Literal["mean", "cls"] = "mean"
) -> Method:
    """Keep the visual tokens that receive most attention in the layer whose features are used, in their order.

    rate: share kept. strategy: "rank" keeps the highest tokens, "row" whole rows of the image, those of the highest
    sum, which suits text; a share is rounded to whole rows, and tokens= must be such a number. query: whose attention
    counts, that of all tokens in the mean or the class token's (the paper does not say which; "cls" is FasterVLM's).
    """
    if strategy not in ("rank", "row"):
        raise UnsupportedMethod(f"strategy={strategy!r}: use 'rank' or 'row'")
    if query not in ("mean", "cls"):
        raise UnsupportedMethod(f"query={query!r}: use 'mean' or 'cls'")
    return Method(
        name="fopru",
        paper="Jiang et al., FoPru, 2024",
        schedule=Stages(rate),
        select=keep_top_k,
        needs=frozenset({"language model", *(["class token"] if query == "cls" else [])}),
        after_tower=AfterTower(
            keep_top_k if strategy == "rank" else keep_rows,
            score=attention_received if query == "mean" else attention_to_class,
            whole_rows=strategy == "row",
        ),
    )


def keep_rows(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Keep the rows of the grid with the highest sums of scores [B, n], `keep` tokens of whole rows."""
    assert scores is not None
    assert record.grid is not None
    rows, columns = record.grid
    best = ranked(scores.view(-1, rows, columns).sum(2))[:, : keep // columns].sort(dim=1).values
    return Reduction(gather(record.origin.view(-1, rows, columns), best).flatten(1))
