"""The commands of the command line for the small diffusion models."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.commands import budgets, check_output, checked_device, emit, finish, refuse_foreign, set_machine
from tokenprune.evals.digits_denoisers import untrained
from tokenprune.evals.digits_pipelines import GUIDANCE, STEPS, DigitsPipeline, digits_pipeline, pipeline_of
from tokenprune.evals.generation import evaluate_generation
from tokenprune.evals.generation_bench import bench_generation
from tokenprune.evals.ranks import ranks
from tokenprune.evals.records import read_lines
from tokenprune.evals.stats import bootstrap_mean
from tokenprune.evals.table import Row, Table, interval_cells


def run_eval(options: argparse.Namespace) -> int:
    """`tokenprune eval --model dit-digits`"""
    check_output(options)
    refuse_foreign(options, ("steps", "guidance", "rounds"))
    if options.random_weights:
        raise TokenPruneError("pictures of random weights say nothing; --random-weights is for bench")
    table = evaluate_generation(
        load_digits(options),
        options.method,
        budgets(options),
        samples=options.samples or 1000,
        batch_size=options.batch_size,
        steps=options.steps or STEPS,
        guidance=GUIDANCE if options.guidance is None else options.guidance,
        rounds=options.rounds,
        seed=options.seed,
        show_progress=not options.quiet,
    )
    return finish(table, options)


def run_bench(options: argparse.Namespace) -> int:
    """`tokenprune bench --model dit-digits`"""
    if options.batch_size is not None:
        raise TokenPruneError("--batch-size is for models that take images; whole runs are timed at one batch size")
    if options.profile or options.save_profile:
        raise TokenPruneError("--profile and --save-profile are for models that take images")
    check_output(options)
    table = bench_generation(
        load_digits(options),
        options.method,
        budgets(options),
        steps=options.steps or STEPS,
        guidance=GUIDANCE if options.guidance is None else options.guidance,
        rounds=options.rounds,
        seed=options.seed,
        show_progress=not options.quiet,
    )
    return finish(table, options)


def score(options: argparse.Namespace) -> int:
    """`tokenprune score`"""
    from tokenprune.evals.full_size import clip_score, inception_fid, picture_files
    from tokenprune.evals.models import load_model
    from tokenprune.evals.picture_scores import frechet_of_folders, pair_scores

    check_output(options)
    row: Row = {"pictures": len(picture_files(options.pictures))}
    if options.real is None and options.prompts is None and options.reference is None:
        raise TokenPruneError(
            "nothing to score against: name --real FOLDER for a Fréchet distance, --prompts FILE for CLIP, --reference"
            " FOLDER for PSNR, SSIM and LPIPS"
        )
    with ranks() as processes:
        if options.reference is not None:
            for name, values in pair_scores(options.pictures, options.reference, lpips=options.lpips).items():
                row |= interval_cells(name, bootstrap_mean(values, seed=options.seed))
        elif options.lpips is not None:
            raise TokenPruneError("--lpips is a distance to pictures; name them with --reference FOLDER")
        if options.features is not None and options.real is None:
            raise TokenPruneError("--features is of a Fréchet distance to real pictures; name them with --real FOLDER")
        if options.features is not None:
            extractor = load_model(options.features, checkpoint=options.checkpoint)
            extractor.model.to(checked_device(options.device or "cpu"))
            distance = frechet_of_folders(options.pictures, options.real, extractor, seed=options.seed)
            row |= interval_cells("frechet", distance)
        elif options.real is not None:
            fid = partial(
                inception_fid, options.pictures, options.real, weights=options.inception, device=options.device
            )
            row["fid"] = processes.from_main(fid)
        if options.prompts is not None:
            prompts = read_lines(options.prompts, "prompts")
            scores = clip_score(picture_files(options.pictures), prompts, model=options.clip, device=options.device)
            row |= interval_cells("clip_score", bootstrap_mean(scores, seed=options.seed))
    emit(Table([row]), options)
    return 0


def load_digits(options: argparse.Namespace) -> DigitsPipeline:
    """The pipeline that the options name, where and as they want it."""
    set_machine(options)
    given = [f"--{name}" for name in ("data", "split") if getattr(options, name, None) is not None]
    if given:
        raise TokenPruneError(f"{options.model} draws its pictures; it takes no {', '.join(given)}")
    if options.random_weights:
        if options.checkpoint is not None:
            raise TokenPruneError("--random-weights or --checkpoint, not both")
        pipe = pipeline_of(untrained(options.model))
    else:
        pipe = digits_pipeline(options.model, [] if options.checkpoint is None else [options.checkpoint])
    pipe.to(options.device, getattr(torch, options.dtype))
    return pipe
