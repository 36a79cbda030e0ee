"""Top-K by class attention (Haurum et al., "Which Tokens to Use?", 2023, section 3.1)."""

from tokenprune.lvlm.recipe import AfterTower
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.attention import attention_to_class
from tokenprune.selection.top_k import keep_top_k


@register_method("top_k")
def top_k(*, rate: float = 0.7, places: tuple[int, ...] | None = None) -> Method:
    """Keep the tokens that the class token attends to most; without a class token, those that receive most attention.

    rate: share kept at each of `places` (a quarter, a half and three quarters of the depth). Behind the tower of a
    vision-language model the class token's attention is the mean over all layers up to the one whose output is used
    (Wang et al., VTC-CLS, 2024): it looks at one thing in one layer and at another in the next. That of this layer
    alone is "fopru" with query="cls".
    """
    return Method(
        name="top_k",
        paper="Haurum et al., Which Tokens to Use?, 2023",
        schedule=Stages(rate, places),
        score=attention_to_class,
        select=keep_top_k,
        needs=frozenset({"queries", "keys"}),
        after_tower=AfterTower(keep_top_k, score=attention_to_class, start_layer=0, by_class_token=True),
    )
