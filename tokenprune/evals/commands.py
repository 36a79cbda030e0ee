"""What each command of the command line does with its options."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.accuracy import evaluate
from tokenprune.evals.arms import SMALLER_INPUT, UNPATCHED, Arm, Budget, build_arms, is_unpatched, runnable
from tokenprune.evals.bench import bench
from tokenprune.evals.data import ImageData, open_data
from tokenprune.evals.digits_denoisers import CHECKPOINTS as DIFFUSION
from tokenprune.evals.digits_lvlm import LVLM
from tokenprune.evals.latency_profile import profile_latency
from tokenprune.evals.model_kinds import PREFIXES
from tokenprune.evals.models import DEBLUR, DIGITS, SWIN, LoadedModel, load_model, noise
from tokenprune.evals.ranks import is_main, own_device
from tokenprune.evals.reading import read_picture
from tokenprune.evals.sources import openclipart_data
from tokenprune.evals.table import SUFFIXES, Row, Table, checked_path
from tokenprune.evals.transforms import denormalize, input_size
from tokenprune.evals.viz import Panel, contact_sheet, place_panels
from tokenprune.latency import table_path

OWN_SAMPLES = 1000
VIZ_IMAGES = 3
DEFAULT_BUDGET: Budget = {"flops": 0.6}


def methods(options: argparse.Namespace) -> int:
    """`tokenprune methods`"""
    if options.table:
        return _method_table(options)
    check_output(options)
    model: object = None
    if options.model in DIFFUSION:
        from tokenprune.evals.digits_denoisers import untrained
        from tokenprune.evals.digits_pipelines import digits_pipeline, pipeline_of

        folder = options.checkpoint  # what fits depends on the blocks alone
        model = digits_pipeline(options.model, [folder]) if folder else pipeline_of(untrained(options.model))
    elif options.model == LVLM:
        from tokenprune.evals.digits_lvlm import lvlm

        model = lvlm()
    elif options.model is not None and options.model.startswith(tuple(PREFIXES)):
        from tokenprune.evals.report_command import of_hub

        model = of_hub(options).target
    elif options.model is not None:
        model = load_model(options.model, checkpoint=options.checkpoint, random_weights=options.random_weights).model
    rows: list[Row] = [
        {
            "name": info.name,
            "paper": info.paper,
            "needs": ", ".join(info.needs) or "nothing",
            "families": ", ".join(info.families),
            "options": ", ".join(f"{name}={default!r}" for name, default in info.options.items()),
        }
        for info in tokenprune.methods(model)
    ]
    emit(Table(rows), options)
    return 0


def _method_table(options: argparse.Namespace) -> int:
    """`tokenprune methods --table`"""
    from tokenprune.evals.method_table import method_table, to_markdown

    if options.model is not None or options.format == "csv":
        raise TokenPruneError("--table is of all families, as Markdown or JSON: leave out --model and --csv")
    path = None if options.output is None else checked_path(options.output, (".md", ".json"))
    table = method_table()
    print(table.to_json() if options.format == "json" else to_markdown(table), end="")
    if path is not None:
        path.write_text(table.to_json() if path.suffix == ".json" else to_markdown(table), encoding="utf-8")
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """`tokenprune bench`"""
    check_output(options)
    loaded = load(options)
    sizes = options.batch_size or [8]
    if options.data is None and loaded.data is None:
        inputs, source = noise(loaded, max(sizes), options.seed), "noise"
    else:
        data = image_data(options, loaded, max(sizes))
        inputs, source = first_images(data, max(sizes), options.seed), data.name
    table = bench(
        loaded.model,
        inputs.to(options.device, getattr(torch, options.dtype)),
        options.method,
        budgets(options),
        batch_sizes=sizes,
        rounds=options.rounds,
        seed=options.seed,
        profile=options.profile,
        show_progress=not options.quiet,
    )
    if options.save_profile:
        _save_profile(options, loaded.model, inputs.to(options.device, getattr(torch, options.dtype)), table, sizes)
    return finish(table, options, inputs=source)


def _save_profile(
    options: argparse.Namespace, model: nn.Module, inputs: Tensor, table: Table, sizes: Sequence[int]
) -> None:
    """Stores the latency table of the methods that `table` has rows of, at the first budget."""
    names = dict.fromkeys(str(row["method"]) for row in table.rows if row["method"] not in (UNPATCHED, SMALLER_INPUT))
    profiled = profile_latency(
        model, inputs, list(names), budgets(options)[0], batch_sizes=sizes, rounds=options.rounds, seed=options.seed
    )
    path = table_path(model)
    profiled.save(path)
    print(f"latency table: {path}", file=sys.stderr)


def run_eval(options: argparse.Namespace) -> int:
    """`tokenprune eval`"""
    check_output(options)
    loaded = load(options)
    data = image_data(options, loaded, options.samples or OWN_SAMPLES)
    table = evaluate(
        loaded.model,
        data,
        options.method,
        budgets(options),
        batch_size=options.batch_size,
        samples=options.samples,
        workers=options.workers,
        seed=options.seed,
        saliency=loaded.saliency if data.classes is None else None,
        show_progress=not options.quiet,
    )
    return finish(table, options)


def viz(options: argparse.Namespace) -> int:
    """`tokenprune viz`"""
    from PIL import Image

    checked_path(options.output, Image.registered_extensions())
    loaded = load(options)
    if options.image:
        inputs = image_files(options.image, loaded)
    elif loaded.data is None:
        raise TokenPruneError(f"{options.model} has no images of its own; name one with --image FILE")
    else:
        inputs = first_images(loaded.data(VIZ_IMAGES, options.seed), VIZ_IMAGES, options.seed)
    inputs = inputs.to(options.device, getattr(torch, options.dtype))
    arms = build_arms(loaded.model, inputs[:1], options.method, budgets(options), baselines=False)
    patched = [arm for arm in arms if arm.is_patched]
    if not patched:
        raise TokenPruneError("; ".join(arm.note for arm in arms if arm.note))
    contact_sheet(kept_rows(loaded, inputs, patched, places=options.places)).save(options.output)
    print(options.output)
    return 0


def kept_rows(loaded: LoadedModel, inputs: Tensor, arms: Sequence[Arm], *, places: int) -> list[list[Panel]]:
    """A row for each image of `inputs` [B, C, H, W] and each patched arm: the image, then its tokens place by place."""
    pictures = denormalize(inputs.cpu(), loaded.mean, loaded.std)
    return [
        place_panels(model, image[None], picture, f"{arm.method}, {arm.budget}", places=places)
        for image, picture in zip(inputs, pictures, strict=True)
        for arm, model, _ in runnable(arms, arms)
    ]


def train(options: argparse.Namespace) -> int:
    """`tokenprune train`"""
    from tokenprune.evals import (
        train_deblur,
        train_diffusion,
        train_digits,
        train_lvlm,
        train_masks,
        train_reader,
        train_swin,
    )

    if options.flops is not None or options.data is not None:
        raise TokenPruneError(
            "a recipe has images of its own and no budget; what a method learns for a model is trained by tokenprune"
            f" train {options.model} --method ltmp --flops 0.6 --output FOLDER"
        )
    if options.model in (*DIFFUSION, LVLM, SWIN, DEBLUR) and options.steps is not None:
        raise TokenPruneError(
            f"--steps is for digits-vit, digit-reader and digit-masks; {options.model} is trained by its recipe"
        )
    torch.set_num_threads(options.threads)
    whole: dict[str, Callable[[Path], dict[str, Any]]] = {
        **{name: partial(train_diffusion.train, name) for name in DIFFUSION},
        LVLM: train_lvlm.train,
        SWIN: train_swin.train,
        DEBLUR: train_deblur.train,
    }
    short = {DIGITS: train_digits, "digit-masks": train_masks, "digit-reader": train_reader}
    as_json = options.format == "json"
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # trainings print how far they are
        if options.model in whole:
            record = whole[options.model](Path(options.output))
            told = f"{record['training_cpu_seconds']} s of CPU time"
        else:
            recipe = short[options.model]
            record = recipe.train(Path(options.output), options.steps or recipe.STEPS)
            score = next(value for name, value in record.items() if name in ("test_accuracy", "test_mean_iou"))
            told = f"test {score:.3f}"
    print(json.dumps(record, indent=2) if as_json else f"{told}, written to {options.output}")
    return 0


def set_machine(options: argparse.Namespace) -> None:
    """Threads and seed of this process, as the options say.

    Raises TokenPruneError for a device that is not there, or computes nothing.
    """
    options.device = checked_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def checked_device(name: str) -> str:
    """The device called `name`, of several processes on a machine that of this one.

    Raises TokenPruneError for one that is not there, or computes nothing.
    """
    if name.split(":")[0] == "meta":
        raise TokenPruneError("--device meta: its tensors have no values; use cpu")
    device = own_device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TokenPruneError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return device


def load(options: argparse.Namespace) -> LoadedModel:
    """The model that the options name, where and as they want it."""
    refuse_foreign(options)
    set_machine(options)
    loaded = load_model(options.model, checkpoint=options.checkpoint, random_weights=options.random_weights)
    loaded.model.to(options.device, getattr(torch, options.dtype))
    return loaded


OF_SOME = {
    "steps": (*DIFFUSION, "pipe:NAME"),
    "guidance": (*DIFFUSION, "pipe:NAME"),
    "rounds": (*DIFFUSION, LVLM),
    "max_new_tokens": ("vlm:NAME",),
    "clip": ("pipe:NAME",),
    "lpips": ("pipe:NAME",),
    "classes": ("clip:NAME",),
    "template": ("clip:NAME",),
}
"""Options of eval that not all models take: whose they are."""


def refuse_foreign(options: argparse.Namespace, own: Sequence[str] = ()) -> None:
    """Raises TokenPruneError for an option that is not for such a model; own: those that are."""
    names = OF_SOME if options.command == "eval" else ("steps", "guidance")
    foreign = [name for name in names if name not in own and getattr(options, name, None) is not None]
    if foreign:
        theirs = ", ".join(name for name in OF_SOME[foreign[0]] if options.command == "eval" or ":" not in name)
        told = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise TokenPruneError(f"{told}: only for {theirs}, not for {options.model}")


def budgets(options: argparse.Namespace, default: Sequence[Budget] = (DEFAULT_BUDGET,)) -> list[Budget]:
    """The budgets that the options name, `default` where they name none."""
    named: list[Budget] = [
        {kind: value} for kind in ("flops", "keep", "tokens") for value in getattr(options, kind) or ()
    ]
    return named or list(default)


def image_data(options: argparse.Namespace, loaded: LoadedModel, count: int) -> ImageData:
    """What --data names, or the model's own images: `count` of them where they are drawn."""
    name = options.data
    if name is None:
        if loaded.data is None:
            raise TokenPruneError(f"{options.model} has no images of its own; name some with --data")
        return loaded.data(count, options.seed)
    if name.split(":")[0] == "openclipart" and not Path(name).is_dir():
        from tokenprune.evals.openclipart import DEBIAN_FOLDER

        folder = Path(name.partition(":")[2] or DEBIAN_FOLDER)
        return openclipart_data(folder, input_size(loaded.model)[1], loaded.mean, loaded.std)
    classes = getattr(loaded.model, "num_classes", None)
    return open_data(name, loaded.transform, split=options.split, num_classes=classes)


def first_images(data: ImageData, count: int, seed: int) -> Tensor:
    """`count` images drawn by `seed`, or all where there are fewer: [B, C, H, W]."""
    images, _ = next(data.batches(count, samples=min(count, data.size), seed=seed))
    return images


def image_files(paths: Sequence[str], loaded: LoadedModel) -> Tensor:
    """The pictures at `paths` as the model takes them, [B, C, H, W]."""
    return torch.stack([loaded.transform(read_picture(path)) for path in paths])


def check_output(options: argparse.Namespace) -> None:
    """Raises TokenPruneError where the table could not be saved where the options say."""
    if options.output is not None:
        checked_path(options.output, SUFFIXES)


def emit(table: Table, options: argparse.Namespace) -> None:
    """Prints the table in the format that the options name, and saves it where they say, once for all processes."""
    if not is_main():
        return
    printed: dict[str | None, Any] = {"json": table.to_json, "csv": table.to_csv, "markdown": table.to_markdown}
    print(printed.get(options.format, table.to_text)().rstrip("\n"))
    if options.output is not None:
        table.save(options.output)


def finish(table: Table, options: argparse.Namespace, **environment: Any) -> int:
    """Emits the table of a model's rows; the exit code, 1 where not a single method could be run."""
    table.environment = {"model": options.model, **environment, **table.environment}
    emit(table, options)
    ran = [row for row in table.rows if row.get("flops_ratio") is not None and not is_unpatched(str(row["method"]))]
    if not ran:
        print("tokenprune: error: no method could be run; the notes of the table say why", file=sys.stderr)
    return 0 if ran else 1
