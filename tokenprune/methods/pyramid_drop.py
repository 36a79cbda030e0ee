"""PyramidDrop: the same share of the visual tokens dropped at each of three stages (Xing et al., CVPR 2025)."""

from __future__ import annotations

from functools import partial

from tokenprune.lvlm.recipe import InsideModel
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages, checked_places
from tokenprune.selection.top_k import keep_top_k


@register_method("pyramid_drop")
def pyramid_drop(*, rate: float = 0.5, places: tuple[int, ...] | None = None) -> Method:
    """Keep the visual tokens to which the last text token attends most in the layer that is to come, as it attends,
    mean over heads.

    rate: share kept at each stage (0.5: a half, a quarter and an eighth are left). places: the layers before which
    tokens are dropped (a quarter, a half and three quarters of the depth). Positions stay the original ones, where the
    published code counts them anew.
    """
    return Method(
        name="pyramid_drop",
        paper="Xing et al., PyramidDrop, CVPR 2025",
        schedule=Stages(rate),
        select=keep_top_k,
        needs=frozenset({"language model"}),
        inside_model=InsideModel(
            partial(_places, at=places),
            _kept,
            partial(_rate, stages=3 if places is None else len(set(places))),
            scored=0,
            rotary=True,
            softmax="all",
        ),
    )


def _places(depth: int, at: tuple[int, ...] | None) -> tuple[int, ...]:
    return checked_places(at if at is not None else tuple(max(1, depth * q // 4) for q in (1, 2, 3)), depth)


def _kept(rate: float, stage: int, entering: int, total: int) -> int:
    return max(1, int(rate ** (stage + 1) * total))


def _rate(share: float, total: int, on_grid: int, stages: int) -> float:
    return float(share ** (1 / stages))
