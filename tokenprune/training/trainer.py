"""The trainer: it knows accelerate, timm's optimisers and schedulers, and of a method what it declares as `Learned`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.api import patched
from tokenprune.budget import checked_count, checked_share, parse_budget
from tokenprune.calibration import evaluating
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.evals.data import ImageData, Transform, open_data
from tokenprune.family import active_patches
from tokenprune.finding import bare, find_models
from tokenprune.learned_parts import LearnedParts, block_norms
from tokenprune.learning import Recipe, Shape
from tokenprune.method import Method
from tokenprune.patch import Patch
from tokenprune.registry import make_method
from tokenprune.schedule import Layout
from tokenprune.towers import Towers, untrained
from tokenprune.training.budget import budget_of, on_budget
from tokenprune.training.distillation import Distillation, checked_weight, twin
from tokenprune.training.sampling import ByTurn, Order, loader
from tokenprune.training.state import FILE, generators, set_generators
from tokenprune.training.taught import Taught
from tokenprune.training.work import Work

MEASURED = 256
"""Images of the training data on which the multiply-adds with the learned parts are counted in the end, and by which
they are brought to the budget where they are not."""


def train(
    model: nn.Module,
    images: object,
    method: str = "ltmp",
    *,
    flops: float,
    output: str | PathLike[str] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    learning_rate: float = 1.0,
    opt: str | None = None,
    sched: str | None = None,
    mixed_precision: str | None = None,
    seed: int = 0,
    workers: int = 0,
    save_every: int = 100,
    transform: Transform | None = None,
    split: str | None = None,
    show_progress: bool = False,
    distill_logits: float | None = None,
    distill_tokens: float | None = None,
    model_rate: float | None = None,
    **options: Any,
) -> LearnedParts:
    """Train what `method` learns on `model`, an image tower with a classifier, or what holds one and puts out maps of
    logits [B, classes, h, w]. The model's own weights stay as they are, or are trained at a model_rate.

    images: a pair of images [N, C, H, W] and labels [N], or maps of labels [N, h, w], a folder with a subfolder for
    each class, a Hugging Face data set (of its `split`), or an `ImageData`. transform: from an RGB PIL image to
    [C, H, W]; None takes timm's training transform of the model. flops: share of the multiply-adds, scoring counted,
    that the mean image is to cost; what a method has learned that scores for any budget is used at others too.

    output: a folder for what is learned (`learned.safetensors` and `learned.json`) and for the state, every
    `save_every` steps, from which a call with the same arguments goes on exactly where a killed one has stopped.

    epochs, batch_size, opt, sched: None takes the paper's; the last two are names of timm's. batch_size: images of a
    process at a time; a step of the optimiser takes `accumulate` such batches of every process. learning_rate: times
    the paper's. seed: of the order and the augmentation of the images, which depend on nothing else. options: of the
    method.

    distill_logits, distill_tokens: weights of two losses by which the unpatched model is a teacher, None for the
    paper's (DynamicViT, Rao et al., NeurIPS 2021, equations 9 and 10, has 0.5 of each): the divergence of its class
    probabilities from those under the patch, and the squared difference of the tokens that are left behind the last
    block, layer-normalised without a scale. The second is of methods that mask, as mixed tokens have no teacher.

    model_rate: peak learning rate of the model's own weights that require a gradient; None takes the recipe's, which is
    0.0, none at all, of every method here. Above zero the model is changed, and `model.safetensors` in the folder has
    its weights, which belong to what is learned (DynamicViT was published with a hundredth of its rate, 1e-5). It stays
    in eval mode, and the teacher is a copy of what it was.

    Under `accelerate launch` it runs on as many processes and machines as that says, each calling this with the same
    arguments. mixed_precision: "bf16" or "fp16", None as accelerate is set up.

    Returns what `tokenprune.patch(model, method, weights=...)` takes. But for its trained weights the model is left as
    it is.

    Raises:
        BudgetError: `flops` is no share in (0, 1], or one that the method cannot meet.
        UnsupportedMethod: the method learns nothing, or cannot be on the model. UnsupportedModel: no image tower with a
            classifier.
        TokenPruneError: no images, fewer than a step takes, no labels, a state of another training, a loss that is not
            finite (the state then stays the last one that was written).
    """
    aim, recipe = checked_share("flops", flops), _recipe(method, options)
    distill = Distillation(
        checked_weight("distill_logits", recipe.distill_logits if distill_logits is None else distill_logits),
        checked_weight("distill_tokens", recipe.distill_tokens if distill_tokens is None else distill_tokens),
    )
    own = checked_weight("model_rate", recipe.model_rate if model_rate is None else model_rate, example=1e-5)
    start = _start(model, method, aim, seed, distill, options)
    data = _labelled(images, model, transform, split)
    accelerator = _accelerator(mixed_precision, checked_count("accumulate", accumulate, smallest=1, example=1))
    accumulate, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    batch = checked_count(
        "batch_size", recipe.batch_size if batch_size is None else batch_size, smallest=1, example=128
    )
    epochs = checked_count("epochs", recipe.epochs if epochs is None else epochs, smallest=1, example=1)
    save_every = checked_count("save_every", save_every, smallest=1, example=100)
    per_epoch = data.size // (batch * processes * accumulate)
    if per_epoch == 0:
        raise TokenPruneError(
            f"{data.name} has {data.size} images, and a step takes {batch * processes * accumulate}: batch_size={batch}"
            f" of {processes} processes, {accumulate} times; use a smaller batch_size"
        )
    told = {
        "method": method,
        "options": dict(options),
        "flops": aim,
        "epochs": epochs,
        "batch_size": batch,
        "processes": processes,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "distill_logits": distill.logits,
        "distill_tokens": distill.tokens,
        "model_rate": own,
        "opt": opt or recipe.opt,
        "sched": sched or recipe.sched,
        "mixed_precision": accelerator.mixed_precision,
        "seed": seed,
        "data": data.name,
        "images": data.size,
        "architecture": dict(start.architecture),
    }
    order = Order(
        data.size,
        batch,
        per_epoch * accumulate,
        epochs,
        seed=seed,
        process=accelerator.process_index,
        processes=processes,
    )
    session, seeded = _told(make_method(method, options), options, aim, start), seed + accelerator.process_index
    teacher = twin(model).to(accelerator.device) if distill and own else None
    with _session(model, method, session, start, data, accelerator.device, seeded, frozen=not own) as patch:
        taught = Taught(
            model,
            patch,
            last=_last(model, patch),
            width=int(start.architecture["width"]),
            flops=aim,
            smoothing=recipe.smoothing,
            distill=distill,
            across=partial(accelerator.reduce, reduction="mean"),
            teacher=None if teacher is None else (teacher, _last(teacher, patch)),
        )
        work = Work(patch, taught, accelerator, start, told, steps=per_epoch * epochs, per_epoch=per_epoch)
        state = None if output is None else Path(output) / FILE
        if state is not None and state.exists():
            work.resume(state)
        order.start = work.step * accumulate
        taken = iter(loader(data.items, order, workers=workers))
        work.run(taken, state, accumulate=accumulate, save_every=save_every, show=show_progress)
        parts = work.parts()
    if own:
        parts = replace(parts, norms=_norms(model))
    items = ByTurn(data.items, seed)
    sample = torch.stack([items[epochs - 1, image][0] for image in range(min(data.size, MEASURED))])
    parts = on_budget(model, parts, sample.to(_device(model)), batch)
    if output is not None and accelerator.is_main_process:
        parts.save(output)
    accelerator.wait_for_everyone()
    return parts


def _recipe(method: str, options: dict[str, Any]) -> Recipe:
    learned = make_method(method, options).learned
    if learned is None:
        raise UnsupportedMethod(f"{method} learns nothing: patch(model, {method!r}, flops=0.6) works as it is")
    return learned.recipe


def _start(
    model: nn.Module, method: str, flops: float, seed: int, distill: Distillation, options: dict[str, Any]
) -> LearnedParts:
    """The learned parts as they start."""
    recipe = make_method(method, options)
    option = recipe.schedule.option
    budget = parse_budget(flops=budget_of(recipe, flops).get("flops"), own=(option, options.get(option)))
    if budget.is_full:
        raise BudgetError(f"{budget} leaves nothing out, and {method} has nothing to learn; use flops=0.6")
    if distill.tokens and recipe.mask is None:
        raise UnsupportedMethod(
            f"distill_tokens={distill.tokens:g} compares tokens that are left with the same ones of the unpatched"
            f" model, and {method} mixes them; distill_logits= works"
        )
    found = find_models(model)
    tower, family = found[0]
    if len(found) != 1 or not isinstance(family, Towers):
        raise UnsupportedModel(
            f"{method} is trained on an image tower with a classifier, not on {type(model).__name__}"
        )
    with bare(tower, family):
        host = family.adapter.host(tower)
        if recipe.learned is not None and recipe.learned.places is not None:
            learning = recipe.learned.places(Layout(len(host.blocks), host.num_prefix_tokens))
            budget = parse_budget(schedule=dict.fromkeys(learning, 1.0))
        return untrained(host, family.adapter, recipe, options, budget, seed)


def _told(recipe: Method, options: dict[str, Any], flops: float, start: LearnedParts) -> dict[str, Any]:
    """What `patch` is told in a training: with the budget, or the blocks that learn where these are others."""
    if recipe.learned is None or recipe.learned.places is None:
        return {**options, **budget_of(recipe, flops)}
    return {**options, "places": None, "schedule": {int(name.split(".", 1)[0]): 1.0 for name in start.tensors}}


def _labelled(source: object, model: nn.Module, transform: Transform | None, split: str | None) -> ImageData:
    classes = getattr(model, "num_classes", None)
    if transform is None and not isinstance(source, (ImageData, tuple, list, Tensor)):
        from timm.data import create_transform, resolve_model_data_config

        transform = create_transform(**resolve_model_data_config(model), is_training=True)
    data = open_data(source, transform, split=split, num_classes=classes)
    if data.classes is None:
        raise TokenPruneError(
            f"{data.name} has no labels, which a training needs: a pair (images, labels), or a folder with a subfolder"
            " for each class"
        )
    return data


def _accelerator(mixed_precision: str | None, accumulate: int) -> Any:
    try:
        import accelerate
        import timm.optim  # noqa: F401
    except ImportError as error:
        raise TokenPruneError(f"training needs {error.name}: pip install 'tokenprune-torch[train]'") from error
    try:
        return accelerate.Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)
    except ValueError as error:  # an unknown precision, or another one than this process has begun with
        raise TokenPruneError(f"mixed_precision={mixed_precision!r}: {error}") from error


@contextmanager
def _session(
    model: nn.Module,
    method: str,
    options: dict[str, Any],
    start: LearnedParts,
    data: ImageData,
    device: torch.device,
    seed: int,
    *,
    frozen: bool,
) -> Iterator[Patch]:
    """The model on `device`, `frozen` or not, in eval mode, patched with parts that take gradients, and the global
    generators seeded; all as it was behind it."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before, states = _device(model), generators()
    model.to(device)
    try:
        with patched(model, method, weights=start, **options), evaluating(model):
            patch = next(one for one in active_patches(model).values() if isinstance(one, Patch))
            assert patch.learned is not None
            assert patch.method.learned is not None
            torch.manual_seed(seed)
            if patch.method.learned.trained is not None:
                patch.learned = _trained(patch.method.learned.trained, patch, int(start.architecture["width"]), data)
            if frozen:
                model.requires_grad_(False)
            patch.learned.to(device).requires_grad_(True)
            yield patch
    finally:
        set_generators(states)
        for parameter in learning:
            parameter.requires_grad_(True)
            if not frozen:
                parameter.grad = None
        model.to(before)


def _trained(make: Callable[[Shape], nn.Module], patch: Patch, width: int, data: ImageData) -> nn.ModuleDict:
    assert data.classes is not None
    labels = patch.tokens if data.dense else 1
    shapes = {p: Shape(width, p, patch.depth, classes=data.classes, labels=labels) for p in patch.places}
    return nn.ModuleDict({str(place): make(shape) for place, shape in shapes.items()})


def _last(model: nn.Module, patch: Patch) -> nn.Module:
    """The last block."""
    return find_models(model)[0][0].get_submodule(patch.names[-1])


def _norms(model: nn.Module) -> tuple[float, ...]:
    tower, family = find_models(model)[0]
    assert isinstance(family, Towers)
    with bare(tower, family):
        return block_norms(family.adapter.host(tower))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
