"""The recipe that makes a focus module: the language model, frozen, is the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError
from tokenprune.pyramid.answer import settings_of
from tokenprune.pyramid.focus import Seen
from tokenprune.pyramid.module import FocusModule, rows_of
from tokenprune.pyramid.prompt import host_of, prompt_of
from tokenprune.pyramid.regions import regions_of
from tokenprune.pyramid.walk import walk

_TINY = 1e-12


def distill(
    model: nn.Module,
    module: FocusModule,
    examples: Iterable[tuple[Any, str | Tensor]],
    *,
    processor: Any,
    lr: float = 1e-4,
    share: float = 0.25,
    max_tiles: int = 40,
    shrink: int | None = None,
    batch: int = 8,
) -> list[float]:
    """Train a focus module in place, one step for each example, and return the loss of each.

    An example is (image, question), see `coarse_to_fine`, and so are the settings. The model walks through the image by
    its own attention; on every level that it looks at, the attention of the last token in the first and the last of the
    layers that the module was copied from is what the module's first and last layer are to show (`focus_loss`). The
    model is not changed.

    Luo et al., ICCV 2025 (arXiv 2503.07588), section 3. Optimiser and learning rate are ours: AdamW.

    Raises:
        TokenPruneError: an image fits into one tile, so that there is nothing to learn from.
    """
    host, crops = host_of(model)
    settings = settings_of(crops, processor, share=share, max_tiles=max_tiles, shrink=shrink, batch=batch)
    numbers = module.ends(module.picked)
    optimiser = torch.optim.AdamW(module.parameters(), lr=lr)
    losses: list[float] = []
    for image, question in examples:
        levels: list[tuple[Seen, list[Tensor]]] = []

        def teach(seen: Seen, levels: list[tuple[Seen, list[Tensor]]] = levels) -> Tensor:
            keys = torch.cat([seen.small, seen.places])
            rows = rows_of(host, host.text, [host.layers[n] for n in numbers], numbers, seen.embeds, keys)
            levels.append((seen, rows))
            return rows[-1][:, len(seen.small) :].mean(0)

        regions = regions_of(image)
        walk(host, crops, prompt_of(host, crops, question, processor), regions, teach, settings)
        if not levels:
            raise TokenPruneError(f"an image of {regions.size} pixels fits into one tile of {crops.side}")
        with torch.enable_grad():
            each = [
                focus_loss(rows, module.rows(seen, torch.cat([seen.small, seen.places])), len(seen.small))
                for seen, rows in levels
            ]
            loss = torch.stack(each).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def focus_loss(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    small: int,
    *,
    kl: float = 1.0,
    level: float = 2.0,
    mse: float = 1.0,
) -> Tensor:
    """The distance of attention rows [H, n] in pairs of layers, mean over pairs and heads.

    Of each row: kl (KL(t || s) + level KL(t' || s')) + mse MSE(t, s on the level's tokens), where t' and s' are the
    rows on the level's tokens alone, which sum to 1 again. small: tokens of the small image, which come first.
    """
    distances = []
    for t, s in zip(teacher, student, strict=True):
        t_level, s_level = t[:, small:], s[:, small:]
        on_level = _kl(t_level / t_level.sum(1, keepdim=True), s_level / s_level.sum(1, keepdim=True))
        distances.append(kl * (_kl(t, s) + level * on_level) + mse * (t_level - s_level).square().mean(1))
    return torch.stack(distances).mean()


def _kl(t: Tensor, s: Tensor) -> Tensor:
    return (t * (t.clamp_min(_TINY).log() - s.clamp_min(_TINY).log())).sum(1)
