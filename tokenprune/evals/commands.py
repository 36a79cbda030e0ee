"""What each command of the command line does with its options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.accuracy import evaluate
from tokenprune.evals.arms import SMALLER_INPUT, UNPATCHED, Arm, Budget, build_arms, runnable
from tokenprune.evals.bench import bench
from tokenprune.evals.data import ImageData, open_data
from tokenprune.evals.models import LoadedModel, load_model, noise
from tokenprune.evals.sources import openclipart_data
from tokenprune.evals.table import SUFFIXES, Row, Table, checked_path
from tokenprune.evals.transforms import denormalize, input_size
from tokenprune.evals.viz import Panel, contact_sheet, place_panels

OWN_SAMPLES = 1000
VIZ_IMAGES = 3


def methods(options: argparse.Namespace) -> int:
    """`tokenprune methods`"""
    _check_output(options)
    model = None
    if options.model is not None:
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
    _emit(Table(rows), options)
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """`tokenprune bench`"""
    _check_output(options)
    loaded = _load(options)
    sizes = options.batch_size or [8]
    if options.data is None and loaded.data is None:
        inputs, source = noise(loaded, max(sizes), options.seed), "noise"
    else:
        data = _data(options, loaded, max(sizes))
        inputs, source = _first(data, max(sizes), options.seed), data.name
    table = bench(
        loaded.model,
        inputs.to(options.device, getattr(torch, options.dtype)),
        options.method,
        _budgets(options),
        batch_sizes=sizes,
        rounds=options.rounds,
        seed=options.seed,
        profile=options.profile,
        show_progress=not options.quiet,
    )
    table.environment = {"model": options.model, "inputs": source, **table.environment}
    _emit(table, options)
    return _status(table)


def run_eval(options: argparse.Namespace) -> int:
    """`tokenprune eval`"""
    _check_output(options)
    loaded = _load(options)
    data = _data(options, loaded, options.samples or OWN_SAMPLES)
    table = evaluate(
        loaded.model,
        data,
        options.method,
        _budgets(options),
        batch_size=options.batch_size,
        samples=options.samples,
        workers=options.workers,
        seed=options.seed,
        saliency=loaded.saliency if data.classes is None else None,
        show_progress=not options.quiet,
    )
    table.environment = {"model": options.model, **table.environment}
    _emit(table, options)
    return _status(table)


def viz(options: argparse.Namespace) -> int:
    """`tokenprune viz`"""
    from PIL import Image

    checked_path(options.output, Image.registered_extensions())
    loaded = _load(options)
    if options.image:
        inputs = _pictures(options.image, loaded)
    elif loaded.data is None:
        raise TokenPruneError(f"{options.model} has no images of its own; name one with --image FILE")
    else:
        inputs = _first(loaded.data(VIZ_IMAGES, options.seed), VIZ_IMAGES, options.seed)
    inputs = inputs.to(options.device, getattr(torch, options.dtype))
    arms = build_arms(loaded.model, inputs[:1], options.method, _budgets(options), baselines=False)
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
    """`tokenprune train digits-vit`"""
    from tokenprune.evals import train_digits

    steps = [] if options.steps is None else ["--steps", str(options.steps)]
    train_digits.main(["--output", options.output, "--threads", str(options.threads), *steps])
    return 0


def set_machine(options: argparse.Namespace) -> None:
    """Threads and seed of this process, as the options say.

    Raises TokenPruneError for a device that is not there.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise TokenPruneError(f"--device {options.device}: {str(error).splitlines()[0]}") from error


def _load(options: argparse.Namespace) -> LoadedModel:
    set_machine(options)
    loaded = load_model(options.model, checkpoint=options.checkpoint, random_weights=options.random_weights)
    loaded.model.to(options.device, getattr(torch, options.dtype))
    return loaded


def _budgets(options: argparse.Namespace) -> list[Budget]:
    budgets: list[Budget] = [
        {kind: value} for kind in ("flops", "keep", "tokens") for value in getattr(options, kind) or ()
    ]
    return budgets or [{"flops": 0.6}]


def _data(options: argparse.Namespace, loaded: LoadedModel, count: int) -> ImageData:
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


def _first(data: ImageData, count: int, seed: int) -> Tensor:
    images, _ = next(data.batches(count, samples=min(count, data.size), seed=seed))
    return images


def _pictures(paths: Sequence[str], loaded: LoadedModel) -> Tensor:
    from PIL import Image

    inputs = []
    for path in paths:
        with Image.open(path) as picture:
            inputs.append(loaded.transform(picture.convert("RGB")))
    return torch.stack(inputs)


def _check_output(options: argparse.Namespace) -> None:
    if options.output is not None:
        checked_path(options.output, SUFFIXES)


def _emit(table: Table, options: argparse.Namespace) -> None:
    printed: dict[str | None, Any] = {"json": table.to_json, "csv": table.to_csv, "markdown": table.to_markdown}
    print(printed.get(options.format, table.to_text)().rstrip("\n"))
    if options.output is not None:
        table.save(options.output)


def _status(table: Table) -> int:
    """1 where not a single method could be run."""
    ran = [r for r in table.rows if r.get("flops_ratio") is not None and r["method"] not in (UNPATCHED, SMALLER_INPUT)]
    return 0 if ran else 1
