"""DivPrune: visual tokens that are as unlike each other as can be (Alvar et al., CVPR 2025)."""

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.lvlm.recipe import AfterTower
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.selection.diverse import farthest_first


@register_method("divprune")
def divprune(*, rate: float = 0.098) -> Method:
    """Keep the features whose least distance to each other (1 - cosine) is largest, by the greedy solution; it looks at
    neither attention nor text. rate: share kept."""
    return Method(
        name="divprune",
        paper="Alvar et al., DivPrune, CVPR 2025",
        schedule=Stages(rate),
        select=keep_farthest,
        needs=frozenset({"language model"}),
        after_tower=AfterTower(keep_farthest),
    )


def keep_farthest(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Keep `keep` tokens by `farthest_first` of hidden states."""
    return Reduction(farthest_first(record.hidden[:, record.num_prefix_tokens :], keep).sort(dim=1).values)
