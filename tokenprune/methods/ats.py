"""ATS: adaptive token sampling by the inverse transform of a significance score (Fayyaz et al., ECCV 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.merge import gather
from tokenprune.method import Method
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, Stages
from tokenprune.scores.attention import attention_to_class


def significance(record: AttentionRecord) -> Tensor:
    """Attention of the class token times the norm of the value, summing to one, [B, n] (equation 3)."""
    values = record.v[:, :, record.num_prefix_tokens :].float()
    scores = attention_to_class(record) * values.square().sum((1, 3)).sqrt()
    return scores / scores.sum(1, keepdim=True)


def sample_inverse_cdf(scores: Tensor | None, record: AttentionRecord, keep: int) -> RaggedReduction:
    """Keep the tokens on which `keep` evenly spaced values of the cumulative score fall (section 3.2).

    scores: [B, n]. The tokens are lined up by rising score and their cumulative score is stretched to [0, 1]; the
    values go from its smallest one above zero up to one, each takes the token whose cumulative score is nearest, and a
    token that is taken more than once counts once: the more the score is concentrated, the fewer tokens stay.
    """
    assert scores is not None
    if record.alive is not None:  # what is no token lies in front of the others and adds nothing
        scores = scores.masked_fill(record.alive == 0, -1.0)
    ranked, order = scores.sort(dim=1, stable=True)
    least = torch.where(ranked < 0, float("inf"), ranked).amin(1, keepdim=True)
    cdf = ranked.clamp_min(0.0).cumsum(1)
    cdf = (cdf - least) / (cdf[:, -1:] - least).clamp_min(torch.finfo(cdf.dtype).tiny)
    cdf = cdf.masked_fill(ranked < 0, float("-inf"))  # nearest to no value, of which the lowest may be rounded to zero
    first = torch.where(cdf > 0, cdf, 1.0).amin(1, keepdim=True)
    steps = torch.arange(keep - 1, -1, -1, device=scores.device) / max(keep - 1, 1)
    nearest = _nearest(cdf, 1 - (1 - first) * steps)
    sampled = torch.zeros_like(order, dtype=torch.bool).scatter(1, nearest, True)
    return keep_where(torch.zeros_like(sampled).scatter(1, order, sampled))


def _nearest(line: Tensor, values: Tensor) -> Tensor:
    """Position in the rising `line` [B, n] nearest to each of `values` [B, K], of equally near ones the lower."""
    last = line.shape[1] - 1
    above = torch.searchsorted(line, values).clamp(max=last)
    below = (above - 1).clamp(min=0)
    return torch.where(values - gather(line, below) <= gather(line, above) - values, below, above)


@dataclass(frozen=True)
class FromAQuarter(Stages):
    """Stages in every block from a quarter of the depth on (3 to 11 of 12)."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        return super().places(layout) if self.at is not None else tuple(range(layout.depth // 4, layout.depth))


@register_method("ats")
def ats(*, rate: float = 1.0, places: tuple[int, ...] | None = None) -> Method:
    """Sample tokens by significance, a different number in each image: easy images keep few.

    rate: samples at a place as a share of those at the place before; 1.0, the paper's, is as many as the image has
    patches, everywhere. places: the blocks, from a quarter of the depth on by default (section 4: 3 to 11 of 12).
    keep= and tokens= bound the samples of the last place, and so what is kept; a place takes at least 8 samples.
    """
    return Method(
        name="ats",
        paper="Fayyaz et al., Adaptive Token Sampling, ECCV 2022",
        schedule=FromAQuarter(rate, places, smallest=8),
        score=significance,
        select=sample_inverse_cdf,
        adaptive=True,
        padded=True,
        needs=frozenset({"queries", "keys", "values"}),
    )
