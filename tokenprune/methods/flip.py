"""FLIP (Li et al., "Scaling Language-Image Pre-training via Masking", CVPR 2023) and masks of coloured noise (Hinojosa
et al., "ColorMAE", ECCV 2024)."""

from __future__ import annotations

from functools import partial

from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.drawn import Color, check_color, drawn
from tokenprune.selection.top_k import keep_top_k


@register_method("flip")
def flip(*, rate: float = 0.5) -> Method:
    """In training alone, drop patches at random in front of the first block, of each image its own (FLIP, section 3).

    rate: share kept. In eval mode every token is there; `unpatch` and go on for the paper's unmasked tuning. Prefix
    tokens always stay. Which patches is drawn from torch's own generator, as dropout is: `torch.manual_seed` and the
    generators' states in a checkpoint hold for it.
    """
    return _in_front("flip", "Li et al., Scaling Language-Image Pre-training via Masking, 2023", rate, "white", 1.0)


@register_method("noise_mask")
def noise_mask(*, rate: float = 0.25, color: Color = "green", sigma: float = 1.0) -> Method:
    """`flip` with the patches where filtered noise is strongest (ColorMAE, section 3.2): the pattern knows no image.

    rate: share kept. color: of the noise, "white", "red", "blue", "green" or "purple" (the paper's best is green).
    sigma: width of its Gaussians in patches, see `tokenprune.scores.drawn`. The authors load stored noise, so that the
    width is a choice made here.
    """
    return _in_front("noise_mask", "Hinojosa et al., ColorMAE, 2024", rate, color, sigma)


def _in_front(name: str, paper: str, rate: float, color: Color, sigma: float) -> Method:
    check_color(color, sigma)
    return Method(
        name=name,
        paper=paper,
        schedule=Stages(rate, (0,)),
        score=partial(drawn, color=color, sigma=sigma),
        select=keep_top_k,
        position="front",
        restore="place",
        needs=frozenset({"first_block"}),
        training_only=True,
    )
