"""Adaptive window pruning: a predictor learns which windows of a restoration network are worth computing (Li et al.,
"Adaptive Window Pruning for Efficient Local Motion Deblurring", ICLR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.learning import Learned, Recipe, Shape
from tokenprune.method import Method
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.registry import register_method
from tokenprune.schedule import InEveryBlock
from tokenprune.selection.top_k import first_of
from tokenprune.windows.lesson import WindowLesson

GUIDANCE, PENALTY = 1.0, 10.0
HEAVIEST = 15.0
RATE = 2e-3


class Predictor(nn.Module):
    """How confident a token is that its window should be computed: Linear, GELU, LayerNorm, Linear, half of the hidden
    channels a token's own, half those of the whole image (section 3.2). One output is the difference of the paper's two
    logits. threshold: of a window's mean, above which it is computed; 0.0, a probability of a half, until a budget is
    met by another."""

    threshold: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.width // 2
        self.own = hidden // 2
        self.embed, self.norm = nn.Linear(shape.width, hidden), nn.LayerNorm(hidden)
        self.last = nn.Linear(hidden, 1)
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, C] to logits [B, n]."""
        x = functional.gelu(self.embed(x.to(self.last.weight.dtype)))
        own, shared = x[..., : self.own], x[..., self.own :]
        x = torch.cat([own, shared.mean(1, keepdim=True).expand_as(shared)], -1)
        logits: Tensor = self.last(self.norm(x))
        return logits.squeeze(-1)


def confidence(record: AttentionRecord) -> Tensor:
    """Logits [B, n] of computing each token's window."""
    predictor = record.learned
    assert isinstance(predictor, Predictor)
    logits: Tensor = predictor(record.hidden)
    return logits


def confident(scores: Tensor | None, record: AttentionRecord, keep: int) -> RaggedReduction:
    """Compute the windows whose confidence [B, W] is above the threshold, of more than `keep` the most confident."""
    predictor = record.learned
    assert isinstance(predictor, Predictor)
    assert scores is not None
    kept = scores > predictor.threshold
    if keep < record.tokens:
        kept = kept & first_of(scores, torch.full_like(record.origin[:, :1], keep))
    return keep_where(kept)


def drawn(scores: Tensor) -> Tensor:
    """Masks [B, W] drawn from confidences [B, W] by Gumbel-softmax, one or zero forwards (section 3.2)."""
    logits = torch.stack([scores, torch.zeros_like(scores)], -1)
    return functional.gumbel_softmax(logits, hard=True)[..., 0]


def guided(lesson: WindowLesson, flops: float) -> Tensor:
    """GUIDANCE times the cross-entropy of the confidences with the windows in which something is blurred, the mean over
    all windows that are chosen at a time (section 3.3), and PENALTY times the squared difference between the share of
    the multiply-adds and `flops`. Where the lesson has gains, a blurred window weighs as much as its own is of the mean
    over those of its image, at most HEAVIEST, and every other one as much as the mean. A window that an earlier stage
    has left out is not told: nothing is decided there."""
    told = []
    for key, scores in lesson.confidences.items():
        marked, before = lesson.marked_windows(key), lesson.alive_before(key)
        weight = torch.ones_like(scores) if lesson.gains is None else _weights(marked, lesson.window_gains(key))
        if before is not None:
            weight = weight * before.detach()
        told.append(functional.binary_cross_entropy_with_logits(scores, marked.to(scores.dtype), weight))
    penalty: Tensor = PENALTY * (lesson.cost() - flops) ** 2
    return GUIDANCE * torch.stack(told).mean() + penalty


def _weights(marked: Tensor, gains: Tensor) -> Tensor:
    own = gains.clamp(min=0) * marked
    mean = own.sum(1, keepdim=True) / marked.sum(1, keepdim=True).clamp(min=1)
    return torch.where(marked, (own / mean.clamp(min=torch.finfo(own.dtype).tiny)).clamp(max=HEAVIEST), 1.0)


def rate(name: str, steps: int) -> float:
    """Peak learning rate of the predictors."""
    return RATE


LEARNED = Learned(part=Predictor, penalty=guided, rate=rate, recipe=Recipe(epochs=1, batch_size=4, opt="adamw"))


@register_method("adawpt")
def adawpt() -> Method:
    """Compute the windows that a learned predictor is confident about, attention and MLP, as many as an image needs,
    and pass the others through unchanged.

    Each stage has a predictor in front of its first block; a window's confidence is the mean of its tokens', in blocks
    with shifted windows as in the others. What a stage has left out stays out in later ones of the same resolution,
    window by window, and shifted ones apart from the others. `python -m tokenprune.evals.train_adawpt` learns them for
    the shipped restoration network, by its loss and a mask of what is blurred, while the network's own weights stay as
    they are. flops= names the budget that they were learned for, met in the mean over images; keep= and schedule= bound
    the share computed of each image.
    """
    return Method(
        name="adawpt",
        paper="Li et al., Adaptive Window Pruning (LMD-ViT), ICLR 2024",
        schedule=InEveryBlock(1.0, None),
        score=confidence,
        select=confident,
        adaptive=True,
        needs=frozenset({"windows"}),
        window_score="mean",
        window_mask=drawn,
        window_nested=True,
        learned=LEARNED,
    )
