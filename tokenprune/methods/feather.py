"""FEATHER: two stages inside the language model, by attention without rotary embedding (Endo et al., ICCV 2025)."""

from __future__ import annotations

from functools import partial

from tokenprune.errors import UnsupportedMethod
from tokenprune.lvlm.recipe import InsideModel
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages, checked_places
from tokenprune.selection.top_k import keep_top_k


@register_method("feather")
def feather(
    *, rate: float = 0.3, places: tuple[int, int] | None = None, stride: int = 3, rotary: bool = False
) -> Method:
    """Drop visual tokens before two layers, by the attention that the last text token pays them in the layer before,
    without rotary embedding, which would favour the tokens nearest to the text; at the first stage every third row and
    column of the image stays as well.

    rate: share kept by score at the first stage; at the second, its square of those that are left (0.3: the published
    64% fewer FLOPs). places: the layers before which tokens are dropped (a quarter and half of the depth). stride: of
    the rows and columns that stay. rotary: score with rotary embedding, to compare. Of `tokens` and `keep` the rate is
    solved, and exactly as many are left behind the second stage.
    """
    if stride < 1:
        raise UnsupportedMethod(f"stride is a number of rows, at least 1, got {stride!r}; for example stride=3")
    return Method(
        name="feather",
        paper="Endo et al., FEATHER, ICCV 2025",
        schedule=Stages(rate),
        select=keep_top_k,
        needs=frozenset({"language model"}),
        inside_model=InsideModel(partial(_places, at=places), _kept, _rate, rotary=rotary, stride=stride),
    )


def _places(depth: int, at: tuple[int, int] | None) -> tuple[int, ...]:
    places = checked_places(at if at is not None else (max(1, depth // 4), max(2, depth // 2)), depth)
    if len(places) != 2 or places[0] < 1:
        raise UnsupportedMethod(
            f"places={at!r}: feather drops before two layers behind the first, such as places=(8, 16)"
        )
    return places


def _kept(rate: float, stage: int, entering: int, total: int) -> int:
    return max(1, int(rate * total) if stage == 0 else int(rate**2 * entering))


def _rate(share: float, total: int, on_grid: int) -> float:
    """The rate with which `share` of the tokens is left, where those on the grid are spread like the others."""
    low, high = 0.0, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        if (rate + (1 - rate) * on_grid / total) * rate**2 < share:
            low = rate
        else:
            high = rate
    return high
