"""What `tokenprune report` does with its options: one use of a model of any kind, and what its patch says then."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Budget
from tokenprune.evals.commands import DEFAULT_BUDGET, budgets, first_images, load, refuse_foreign, set_machine
from tokenprune.evals.digits_denoisers import CHECKPOINTS as DIFFUSION
from tokenprune.evals.digits_lvlm import LVLM
from tokenprune.evals.model_kinds import PREFIXES
from tokenprune.evals.models import noise

KEEP: Budget = {"keep": 0.25}
FLOPS: Budget = {"flops": 0.8}
PICTURE_PIXELS = 448
QUESTION, PROMPT = "What is this?", "a photograph"
STEPS = 20


@dataclass(frozen=True)
class Subject:
    """What is patched, one use of it, and the budget where none is named."""

    target: Any
    use: Callable[[], object]
    budget: Budget


def run_report(options: argparse.Namespace) -> int:
    """`tokenprune report`"""
    asked = budgets(options, ())
    if options.schedule is not None:
        asked.append({"schedule": options.schedule})
    if len(asked) > 1:
        raise TokenPruneError("a report is of one budget or schedule; tokenprune bench compares several")
    subject = _subject(options)
    tokenprune.patch(subject.target, options.method, **(asked[0] if asked else subject.budget))
    with torch.inference_mode():
        subject.use()
    told = tokenprune.report(subject.target)
    print(json.dumps(told.to_dict(), indent=2) if options.format == "json" else told)
    return 0


def _subject(options: argparse.Namespace) -> Subject:
    if options.model in DIFFUSION:
        return _digits_denoiser(options)
    if options.model == LVLM:
        return _digits_lvlm(options)
    if options.model.startswith(tuple(PREFIXES)):
        refuse_foreign(options, ("steps", "guidance") if options.model.startswith("pipe:") else ())
        set_machine(options)
        return of_hub(options)
    loaded = load(options)
    example = noise(loaded, 1, options.seed) if loaded.data is None else first_images(loaded.data(1, 0), 1, 0)
    return Subject(
        loaded.model, partial(loaded.model, example.to(options.device, getattr(torch, options.dtype))), DEFAULT_BUDGET
    )


def _digits_denoiser(options: argparse.Namespace) -> Subject:
    from tokenprune.evals.digits_pipelines import GUIDANCE
    from tokenprune.evals.generation_commands import load_digits

    pipe = load_digits(options)
    use = partial(
        pipe,
        torch.tensor([options.seed % 10]),
        num_inference_steps=options.steps or STEPS,
        guidance_scale=GUIDANCE if options.guidance is None else options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
    )
    return Subject(pipe, use, DEFAULT_BUDGET)


def _digits_lvlm(options: argparse.Namespace) -> Subject:
    from tokenprune.evals.lvlm_commands import load_digits
    from tokenprune.evals.lvlm_eval import draw_questions, example_batch

    model = load_digits(options)
    return Subject(model, partial(model, **example_batch(draw_questions(1, options.seed), 1)), KEEP)


def of_hub(options: argparse.Namespace) -> Subject:
    """A model of transformers or diffusers by `clip:NAME`, `vlm:NAME` or `pipe:NAME`; it is used on a square of noise,
    about which a vision-language model is asked, and a pipeline on a prompt."""
    kind, _, name = options.model.partition(":")
    if options.checkpoint is not None or options.random_weights:
        raise TokenPruneError(f"{options.model} comes with its own weights; it takes no --checkpoint, --random-weights")
    of_kind = {"clip": _clip, "vlm": _vlm, "pipe": _pipe}
    return of_kind[kind](name, options)


def _clip(name: str, options: argparse.Namespace) -> Subject:
    from tokenprune.evals.clip import ImageTower, load_clip, pixels

    clip, processor = load_clip(name)
    image = pixels(processor)(_noise_picture(options))[None]
    tower = ImageTower(_placed(clip, options), (image.shape[-2], image.shape[-1])).eval()
    return Subject(tower, lambda: tower(image.to(next(tower.parameters()))), DEFAULT_BUDGET)


def _vlm(name: str, options: argparse.Namespace) -> Subject:
    from tokenprune.evals.questions import load_lvlm, prompt_inputs

    model, processor = load_lvlm(name)
    model = _placed(model, options)
    return Subject(model, lambda: model(**prompt_inputs(processor, _noise_picture(options), QUESTION, model)), KEEP)


def _pipe(name: str, options: argparse.Namespace) -> Subject:
    from tokenprune.evals.prompts import draw, load_pipeline

    pipe = _placed(load_pipeline(name), options)
    steps, guidance = getattr(options, "steps", None) or STEPS, getattr(options, "guidance", None)
    call = {"num_inference_steps": steps, **({} if guidance is None else {"guidance_scale": guidance})}
    return Subject(pipe, lambda: draw(pipe, PROMPT, options.seed, **call), FLOPS)


def _placed(model: Any, options: argparse.Namespace) -> Any:
    """Where and as the options want it; `tokenprune methods` has no such options."""
    return model.to(options.device, getattr(torch, options.dtype)) if "device" in vars(options) else model


def _noise_picture(options: argparse.Namespace) -> Any:
    from PIL import Image

    generator = torch.Generator().manual_seed(getattr(options, "seed", 0))
    values = torch.randint(256, (PICTURE_PIXELS, PICTURE_PIXELS, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(values.numpy())
