"""How many tokens to remove on this device: measured latency against quality over a grid of token counts (Eliopoulos et
al., "Pruning One More Token is Enough", WACV 2025, section 4.2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.fidelity import agreement, correct, observe
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.throughput import measure_together


@dataclass(frozen=True)
class LatencyGrid:
    """What was measured. tokens: prunable tokens kept, the first all of them. latency: time of a batch as a share of
    the unpatched model's. quality: accuracy, or agreement with the unpatched model. alpha: weight of the latency in the
    utility. control: the unpatched model's time over its own, 1 on a machine that does nothing else."""

    tokens: tuple[int, ...]
    latency: tuple[float, ...]
    quality: tuple[float, ...]
    alpha: float = 0.5
    control: float = 1.0

    @property
    def utility(self) -> tuple[float, ...]:
        """alpha (1 - latency over the longest) + (1 - alpha) (quality over the best)."""
        longest, best = max(self.latency), max(max(self.quality), torch.finfo(torch.float64).tiny)
        pairs = zip(self.latency, self.quality, strict=True)
        return tuple(self.alpha * (1 - own / longest) + (1 - self.alpha) * right / best for own, right in pairs)

    @property
    def removed(self) -> int:
        """The tokens to remove, at the highest utility: `patch(model, "pomt", r=grid.removed)`."""
        return self.tokens[0] - self.tokens[self.utility.index(max(self.utility))]


def latency_grid(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_size: int = 4,
    stride: int | None = None,
    alpha: float = 0.5,
    rounds: int = 20,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyGrid:
    """Time and judge `model` with tokens removed at random in its first block, as the paper estimates both offline;
    `model` itself is left as it is.

    images: [B, C, H, W], of which the first `batch_size` are timed and all are judged: by labels [B], or without by the
    unpatched model's answers. stride: between the token counts, a sixteenth of the tokens where it is not given.
    alpha: weight of the latency, the paper's a half. All counts are timed in turn, `rounds` times.

    Raises:
        TokenPruneError: alpha outside of [0, 1], or a stride that is no number of tokens.
    """
    if not 0.0 <= alpha <= 1.0 or (stride is not None and stride < 1):
        raise TokenPruneError(f"alpha={alpha} is in [0, 1] and stride={stride} one token or more")
    base = tokenprune.unpatch(shared_copy(model)).eval()
    whole = tokenprune.report(tokenprune.patch(shared_copy(model), "random", keep=1.0)).to_dict()["tokens"]
    counts = range(whole, 1, -(stride or max(1, whole // 16)))
    models = fewer_tokens(base, counts, seed)
    with torch.inference_mode():
        latency, control = relative_latency(models, images[:batch_size], rounds, seed=seed, clock=clock)
        reference = _answers(base, images, batch_size)
        judged = [_judged(_answers(one, images, batch_size), reference, labels) for one in models]
    return LatencyGrid(tuple(counts), latency, tuple(judged), alpha, control)


def fewer_tokens(base: nn.Module, counts: Sequence[int], seed: int) -> list[nn.Module]:
    """The unpatched `base`, whose tokens are the first of `counts`, and copies that keep as many as the others say,
    drawn at random in the first block."""
    fewer = (tokenprune.patch(shared_copy(base), "random", tokens=n, places=(0,), seed=seed) for n in counts[1:])
    return [base, *fewer]


def relative_latency(
    models: Sequence[nn.Module], images: Tensor, rounds: int, *, seed: int, clock: Callable[[], float]
) -> tuple[tuple[float, ...], float]:
    """Time of each of `models` on images [B, C, H, W] as a share of the first one's, and the first one's over its own;
    all timed in turn."""
    timed = [partial(one, images) for one in (*models, models[0])]
    found = measure_together(timed, rounds, seed=seed, device=images.device, clock=clock)
    return (1.0, *(1 / relative.speedup.estimate for relative in found[1:-1])), found[-1].control


def _answers(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    return torch.cat([observe(model, part).logits for part in torch.split(images, batch_size)])


def _judged(logits: Tensor, reference: Tensor, labels: Tensor | None) -> float:
    right = agreement(logits, reference) if labels is None else correct(logits, labels)
    return float(right.double().mean())
