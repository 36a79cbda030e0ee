"""EViT: keep the attentive tokens and fuse the others into one (Liang et al., ICLR 2022)."""

from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.attention import attention_to_class
from tokenprune.selection.top_k import fuse_rest


@register_method("evit")
def evit(*, rate: float = 0.7, places: tuple[int, ...] | None = None) -> Method:
    """Keep the tokens that the class token attends to most, and one token that is the sum of the others weighted by
    that attention (equation 4). rate: share kept at each of `places`, the fused token included."""
    return Method(
        name="evit",
        paper="Liang et al., EViT, ICLR 2022",
        schedule=Stages(rate, places, smallest=2),
        score=attention_to_class,
        select=fuse_rest,
        needs=frozenset({"queries", "keys"}),
    )
