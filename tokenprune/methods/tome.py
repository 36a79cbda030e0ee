"""ToMe: merge similar tokens in every block (Bolya et al., "Token Merging", ICLR 2023)."""

from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import EveryBlock
from tokenprune.selection.pairs import merge_similar_pairs


@register_method("tome")
def tome(*, r: int = 8, proportional: bool = True, places: tuple[int, ...] | None = None) -> Method:
    """Merge the r most similar pairs of tokens, between attention and MLP, in every block.

    r: tokens removed per block, where no other budget is given. proportional: add log(size) to the
    attention logits of a merged token (section 3, "proportional attention"); the paper has it off for MAE models and
    for models trained with merging.
    """
    return Method(
        name="tome",
        paper="Bolya et al., Token Merging, ICLR 2023",
        schedule=EveryBlock(r, at=places),
        select=merge_similar_pairs,
        merges=True,
        proportional=proportional,
        needs=frozenset({"keys"}),
    )
