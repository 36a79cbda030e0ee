"""FastV: visual tokens dropped once, early in the language model (Chen et al., ECCV 2024)."""

from __future__ import annotations

from functools import partial

from tokenprune.errors import UnsupportedMethod
from tokenprune.lvlm.recipe import InsideModel
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages, checked_places
from tokenprune.selection.top_k import keep_top_k


@register_method("fastv")
def fastv(*, rate: float = 0.5, place: int = 3) -> Method:
    """Keep the visual tokens to which the last text token attends most in the layer before `place`, as that layer
    attends, mean over heads.

    rate: share kept. place: the layer before which the others are dropped (3 in the published evaluations, 2 in the
    paper).
    """
    return Method(
        name="fastv",
        paper="Chen et al., FastV, ECCV 2024",
        schedule=Stages(rate),
        select=keep_top_k,
        needs=frozenset({"language model"}),
        inside_model=InsideModel(partial(_places, at=place), _kept, _rate, rotary=True, softmax="all"),
    )


def _places(depth: int, at: int) -> tuple[int, ...]:
    places = checked_places((at,), depth)
    if places[0] < 1:
        raise UnsupportedMethod(f"place={at}: a layer must stand before it, whose attention is looked at; use place=1")
    return places


def _kept(rate: float, stage: int, entering: int, total: int) -> int:
    return max(1, round(rate * total))


def _rate(share: float, total: int, on_grid: int) -> float:
    return share
