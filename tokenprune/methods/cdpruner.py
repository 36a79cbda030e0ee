"""CDPruner: tokens diverse under the condition of the question, by a determinantal point process (Zhang et al., NeurIPS
2025)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod
from tokenprune.lvlm.recipe import AfterTower
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.selection.diverse import greedy_determinant


@register_method("cdpruner")
def cdpruner(*, rate: float = 1 / 9, question: Tensor | None = None, project: nn.Module | None = None) -> Method:
    """Keep the features that matter to the question and are unlike each other.

    rate: share kept (64 of 576). question: embeddings [T, D] of the question by the text tower that belongs to the
    image tower, each of one piece of it; project: what takes the tower's hidden states to the same space (of a CLIP
    model: its visual projection behind the vision model's last norm). A token's relevance is then the mean of its
    cosines with the pieces, with the sign turned, as published (CLIP's patches are unlike the text that they show).
    Without both, of any model, it is the mean cosine of a feature with the language model's embeddings of the prompt's
    text; the sign for that is not published, and is not turned here. Generation without a cache, which runs the prompt
    anew with each token, then chooses anew each time.
    """
    if (question is None) != (project is None):
        raise UnsupportedMethod("question= and project= belong together: give both, or neither")
    clip = question is not None
    score = None if project is None or question is None else partial(clip_relevance, question=question, project=project)
    return Method(
        name="cdpruner",
        paper="Zhang et al., CDPruner, NeurIPS 2025",
        schedule=Stages(rate),
        select=keep_relevant_and_diverse,
        needs=frozenset({"language model", *(["text tower"] if clip else [])}),
        after_tower=AfterTower(keep_relevant_and_diverse, score=score, text=not clip),
    )


def clip_relevance(record: AttentionRecord, question: Tensor, project: nn.Module) -> Tensor:
    """Mean over the question's pieces of minus the cosine with each patch, [B, n]."""
    patches = functional.normalize(project(record.hidden[:, record.num_prefix_tokens :]).float(), dim=-1)
    pieces = functional.normalize(question.to(patches.device).float(), dim=-1)
    return -(patches @ pieces.T).mean(-1)


def text_relevance(record: AttentionRecord) -> Tensor:
    """Mean over the prompt's text of the cosine with each feature, [B, n]."""
    assert record.text is not None
    text = functional.normalize(record.text.float(), dim=-1)
    features = functional.normalize(record.hidden.float(), dim=-1)
    return (features @ text.mean(1, keepdim=True).transpose(1, 2)).squeeze(2)


def keep_relevant_and_diverse(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Keep `keep` tokens by `greedy_determinant` of hidden states, their quality the relevance scaled to [0, 1] and
    1e-6 more."""
    relevance = text_relevance(record) if scores is None else scores
    least, most = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    quality = (relevance - least) / (most - least).clamp_min(torch.finfo(torch.float32).tiny) + 1e-6
    return Reduction(greedy_determinant(record.hidden, quality, keep).sort(dim=1).values)
