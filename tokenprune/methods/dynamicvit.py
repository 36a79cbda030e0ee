"""DynamicViT: small predictors learn which tokens to keep (Rao et al., "DynamicViT: Efficient Vision Transformers with
Dynamic Token Sparsification", NeurIPS 2021, as in Haurum et al., "Which Tokens to Use?", 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.attention_record import AttentionRecord
from tokenprune.learning import Learned, Lesson, Recipe, Shape
from tokenprune.masking import Masking
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import InFrontOfStages
from tokenprune.selection.top_k import keep_top_k
from tokenprune.tables import positions

RATIO_WEIGHT = 2.0
RATE = 1e-3


class Predictor(nn.Module):
    """Logits of keeping and of dropping each token, from its own features and the mean of those that are left
    (equations 1 to 4): half of the channels are a token's own, half of the whole image."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.own = width // 2
        self.norm, self.embed = nn.LayerNorm(width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, width // 2), nn.Linear(width // 2, width // 4)
        self.last = nn.Linear(width // 4, 2)

    def forward(self, x: Tensor, alive: Tensor | None = None) -> Tensor:
        """x [B, n, C] to [B, n, 2], keeping first. alive: [B, n], None for all."""
        x = F.gelu(self.embed(self.norm(x.to(self.last.weight.dtype))))
        own, shared = x[..., : self.own], x[..., self.own :]
        if alive is None:
            mean = shared.mean(1, keepdim=True)
        else:
            there = alive.unsqueeze(-1).to(x.dtype)
            mean = (shared * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1.0)
        x = torch.cat([own, mean.expand(-1, x.shape[1], -1)], -1)
        logits: Tensor = self.last(F.gelu(self.second(F.gelu(self.first(x)))))
        return logits


def predicted(record: AttentionRecord) -> Tensor:
    """Logits [B, n, 2] of keeping and of dropping each prunable token."""
    predictor = record.learned
    assert isinstance(predictor, Predictor)
    logits: Tensor = predictor(record.hidden[:, record.num_prefix_tokens :], record.alive)
    return logits


def keeping(record: AttentionRecord) -> Tensor:
    """How much rather each token is kept than dropped, [B, n]: a difference of logits, in the order of the
    probabilities, which near one would be equal."""
    logits = predicted(record)
    return logits[..., 0] - logits[..., 1]


def drawn(record: AttentionRecord, keep: int) -> Masking:
    """Keep each token or not by a draw from what is predicted (section 3.2): Gumbel-softmax, one or zero forwards. An
    image of which nothing would be left keeps all that it had."""
    stays = F.gumbel_softmax(predicted(record).float(), hard=True)[..., 0]
    there = torch.ones_like(stays) if record.alive is None else record.alive.to(stays.dtype)
    none = ((stays.detach() * there).sum(1, keepdim=True) == 0).to(stays.dtype)
    return Masking(stays + (1 - stays).detach() * none, positions(record.tokens, stays).expand_as(record.origin))


def off_ratios(lesson: Lesson, flops: float) -> Tensor:
    """RATIO_WEIGHT times the mean over places and images of the squared difference between the share of the tokens that
    is kept and that of the budget (equation 11)."""
    differences = [
        (alive.mean(1) - lesson.leaving[block] / lesson.prunable).square().mean()
        for block, alive in lesson.alive.items()
    ]
    return RATIO_WEIGHT * torch.stack(differences).mean()


def rate(name: str, steps: int) -> float:
    """Peak learning rate of the predictors: as published for a batch of 1,024."""
    return RATE


LEARNED = Learned(
    part=Predictor,
    penalty=off_ratios,
    rate=rate,
    recipe=Recipe(
        epochs=30,
        batch_size=128,
        opt="adamw",
        weight_decay=0.05,
        smoothing=0.1,
        distill_logits=0.5,
        distill_tokens=0.5,
    ),
    bound=False,
)


@register_method("dynamicvit")
def dynamicvit(*, rate: float = 0.7, places: tuple[int, ...] | None = None) -> Method:
    """Keep the tokens that a small learned predictor would keep, the same number in every image.

    `tokenprune train MODEL --method dynamicvit --flops 0.6` learns the predictors while the model's own weights stay as
    they are (as published the model is trained too, at a hundredth of the rate), and they rank the tokens for any other
    budget as well. rate: share kept at each of `places`,
    behind the blocks in front of a quarter, a half and three quarters of the depth.
    """
    return Method(
        name="dynamicvit",
        paper="Rao et al., DynamicViT, NeurIPS 2021",
        schedule=InFrontOfStages(rate, places),
        score=keeping,
        select=keep_top_k,
        mask=drawn,
        learned=LEARNED,
        position="post",
    )
