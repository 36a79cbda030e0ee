"""Prompts, from a file, to a text-to-image pipeline of diffusers: what pruning changes in its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import tokenprune
from tokenprune.errors import BudgetError, TokenPruneError
from tokenprune.evals.arms import (
    DROP_BASELINES,
    FEWER_STEPS,
    UNPATCHED,
    Budget,
    budget_label,
    comparable,
    refuse_training_only,
)
from tokenprune.evals.clip import load_clip, pixels, pooled, text_features
from tokenprune.evals.data import chosen
from tokenprune.evals.generation import psnr
from tokenprune.evals.picture_scores import lpips_of, ssim
from tokenprune.evals.progress import progress
from tokenprune.evals.ranks import ranks
from tokenprune.evals.records import read_lines
from tokenprune.evals.stats import bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells

Scores = dict[str, Tensor]
"""{column: [pictures]}."""


def load_pipeline(name: str) -> Any:
    """The pipeline of a folder, or of a name on the Hugging Face hub.

    Raises TokenPruneError where it cannot be had.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("pipelines need diffusers: pip install 'tokenprune-torch[diffusers]'") from error
    try:
        pipe = DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise TokenPruneError(f"{name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluate_prompts(
    pipe: Any,
    prompts: str | Path,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.8},),
    *,
    steps: int = 20,
    guidance: float | None = None,
    samples: int | None = None,
    seed: int = 0,
    baselines: bool = True,
    clip: str | None = None,
    lpips: str | None = None,
    show_progress: bool = False,
    **options: Any,
) -> Table:
    """Draws a picture for each line of a file, from noise that depends on `seed` and the line alone, with every method
    at every budget; several processes share the prompts out. `pipe` itself is patched, and unpatched at the end.

    steps, guidance (None: the pipeline's own), options: of its call. baselines: random, uniform, and at `flops` budgets
    a run of fewer steps of equal cost. clip: name or folder of a CLIP for the score. lpips: network, see `lpips_of`.

    Columns, means over pictures with 95% bootstrap intervals: `psnr` in dB, `ssim` and `lpips` to the unpatched
    picture; `clip_score`, the cosine with the prompt (at least 0), and `clip_score_drop`, paired.

    Raises TokenPruneError for a file without prompts, a pipeline that gives no pictures, a named method that is unknown
    or does not fit, and where another process has died.
    """
    with ranks() as processes:
        lines = read_lines(prompts, "prompts")
        numbers = chosen(len(lines), samples, seed).tolist()
        own = processes.own([(number, lines[number]) for number in numbers])
        judge, distance = None if clip is None else _judge(clip), None if lpips is None else lpips_of(lpips)
        show = show_progress and processes.is_main
        call = {**options, **({} if guidance is None else {"guidance_scale": guidance})}

        def drawn(count: int, what: str) -> list[Tensor]:
            bar = progress(own, what, show=show)
            return [draw(pipe, prompt, seed + number, num_inference_steps=count, **call) for number, prompt in bar]

        def scored(pictures: Sequence[Tensor]) -> list[dict[str, float]]:
            pairs = zip(pictures, base, own, strict=True)
            return [_scores(one, other, prompt, judge, distance) for one, other, (_, prompt) in pairs]

        tokenprune.unpatch(pipe)
        base = drawn(steps, UNPATCHED)
        found: list[tuple[Row, list[dict[str, float]] | None]] = [(_row(UNPATCHED, "", 1.0), scored(base))]
        names = comparable(pipe) if methods is None else list(methods)
        names += [name for name in DROP_BASELINES if baselines and name not in names]
        try:
            for budget in budgets:
                label = budget_label(budget)
                for name in names:
                    refuse_training_only(name)
                    try:
                        tokenprune.patch(pipe, name, **budget)
                        draw(pipe, lines[numbers[0]], seed, num_inference_steps=steps, **call)
                        ratio = tokenprune.report(pipe).to_dict()["flops_ratio"]
                    except TokenPruneError as error:
                        if methods is not None and name in methods and not isinstance(error, BudgetError):
                            raise
                        found.append((_row(name, label, None, str(error)), None))
                        continue
                    found.append((_row(name, label, ratio), scored(drawn(steps, f"{name} {label}"))))
                tokenprune.unpatch(pipe)
                fewer = max(1, round(steps * budget.get("flops", 1.0)))
                if baselines and fewer < steps:
                    row = _row(FEWER_STEPS, label, fewer / steps, f"{fewer} of {steps} steps")
                    found.append((row, scored(drawn(fewer, FEWER_STEPS))))
        finally:
            tokenprune.unpatch(pipe)

        def table(parts: list[list[dict[str, float] | None]]) -> Table:
            columns = [_columns([part[arm] for part in parts]) for arm in range(len(found))]
            rows = [_with_cells(row, one, columns[0], seed) for (row, _), one in zip(found, columns, strict=True)]
            conditions: Row = {"prompts": Path(prompts).name, "images": len(numbers), "steps": steps}
            return Table(rows, conditions | processes.conditions() | environment(pipe.device, pipe.dtype))

        parts = [[None if each is None else each[number] for _, each in found] for number in range(len(own))]
        return processes.joined(parts, table)


def draw(pipe: Any, prompt: str, seed: int, **call: Any) -> Tensor:
    """A picture [1, 3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    found = getattr(pipe(prompt, generator=generator, output_type="pt", **call), "images", None)
    if not isinstance(found, Tensor) or found.ndim != 4:
        raise TokenPruneError(f"{type(pipe).__name__} gives no pictures [B, 3, H, W] for a prompt")
    return found.detach().float().cpu()


def _judge(name: str) -> Callable[[Tensor, str], float]:
    """The CLIP score of a picture [1, 3, H, W] for a prompt."""
    model, processor = load_clip(name)
    untyped: Any = model
    transform = pixels(processor)

    @torch.inference_mode()
    def score(picture: Tensor, prompt: str) -> float:
        from torchvision.transforms.functional import to_pil_image

        images = transform(to_pil_image(picture[0]))[None]
        features = pooled(untyped.get_image_features(pixel_values=images))
        cosine = functional.cosine_similarity(features, text_features(model, processor, [prompt]))
        return float(cosine.clamp(min=0))

    return score


def _scores(
    one: Tensor,
    other: Tensor,
    prompt: str,
    judge: Callable[[Tensor, str], float] | None,
    distance: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, float]:
    found = {"psnr": float(psnr(one, other)), "ssim": float(ssim(one, other))}
    if distance is not None:
        found["lpips"] = float(distance(one, other))
    if judge is not None:
        found["clip_score"] = judge(one, prompt)
    return found


def _row(method: str, budget: str, ratio: float | None, note: str | None = None) -> Row:
    return {"method": method, "budget": budget, "flops_ratio": ratio, "note": note}


def _columns(parts: Sequence[dict[str, float] | None]) -> Scores:
    given = [part for part in parts if part is not None]
    return {name: torch.tensor([part[name] for part in given], dtype=torch.float64) for name in (given or [{}])[0]}


def _with_cells(row: Row, columns: Scores, base: Scores, seed: int) -> Row:
    told = {name: cell for name, cell in row.items() if name != "note"}
    for name, values in columns.items():
        if name != "clip_score" and row["method"] == UNPATCHED:
            continue  # against itself
        told |= interval_cells(name, bootstrap_mean(values, seed=seed))
        if name == "clip_score" and row["method"] != UNPATCHED:
            told |= interval_cells("clip_score_drop", bootstrap_mean(base[name] - values, seed=seed))
    return {**told, "note": row["note"]}
