"""The trainer: it knows accelerate, timm's optimisers and schedulers, and of a method what it declares as `Learned`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune.budget import checked_count, checked_share
from tokenprune.errors import TokenPruneError
from tokenprune.evals.data import Transform
from tokenprune.learned_parts import LearnedParts
from tokenprune.registry import make_method
from tokenprune.training.arguments import check_output, check_written, labelled_images, recipe_of
from tokenprune.training.budget import on_budget
from tokenprune.training.distillation import Distillation, checked_weight, twin
from tokenprune.training.identity import of_data, of_weights
from tokenprune.training.sampling import ByTurn, Order, loader
from tokenprune.training.session import (
    accelerator_of,
    device_of,
    last_block,
    norms_of,
    session,
    session_options,
    start_of,
)
from tokenprune.training.state import FILE
from tokenprune.training.taught import Taught
from tokenprune.training.tuning import Tuned, check_tuning, described, tuning
from tokenprune.training.work import Work

MEASURED = 256
"""Images of the training data on which the multiply-adds with the learned parts are counted in the end, and by which
they are brought to the budget where they are not."""


LARGEST_SEED = 2**32 - 1
"""What every library takes that may draw in an augmentation."""

MOST_WORKERS = 1024


def train(
    model: nn.Module,
    images: object,
    method: str = "ltmp",
    *,
    flops: float | None = None,
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
    logits [B, classes, h, w]. The model's own weights stay as they are, or are trained at a model_rate. Under a method
    that acts in training forwards alone and says how it trains ("sparsevit" with adapt=, SparseViT's sparsity-aware
    adaptation), they are all that learns, in training mode.

    images: a pair of images [N, C, H, W] and labels [N], or maps of labels [N, h, w], a folder with a subfolder for
    each class, a Hugging Face data set (of its `split`), or an `ImageData`. transform: from an RGB PIL image to
    [C, H, W]; None takes timm's training transform of the model. flops: share of the multiply-adds, scoring counted,
    that the mean image is to cost; what a method has learned that scores for any budget is used at others too. None
    where the model's own weights are all that learns.

    output: a folder for what is learned (`learned.safetensors` and `learned.json`) and for the state, every
    `save_every` steps, from which a call with the same arguments goes on exactly where a killed one has stopped. The
    images are told by all labels (of maps some), the names of files and the sizes of 1,024, 16 tensors, and 8 images as
    the first epoch sees them; one that is not finite may be mended in between. Which weights a model has is told by 64
    values of each.

    epochs, batch_size, opt, sched: None takes the paper's; the last two are names of timm's. batch_size: images of a
    process at a time; a step of the optimiser takes `accumulate` such batches of every process. learning_rate: times
    the paper's, above 0. seed: of the order and the augmentation of the images, which depend on nothing else, from 0 to
    4,294,967,295. workers: processes that read images, 0 to 1,024; 0 is this one. options: of the method.

    distill_logits, distill_tokens: weights of two losses by which the unpatched model is a teacher, None for the
    paper's (DynamicViT, Rao et al., NeurIPS 2021, equations 9 and 10, has 0.5 of each): the divergence of its class
    probabilities from those under the patch, and the squared difference of the tokens that are left behind the last
    block, layer-normalised without a scale. The second is of methods that mask, as mixed tokens have no teacher.

    model_rate: peak learning rate of the model's own weights that require a gradient; None takes the recipe's, which is
    0.0, none at all, of every method here that learns parts. Above zero the model is changed, and `model.safetensors`
    in the folder has its weights, which belong to what is learned (DynamicViT was published with a hundredth of its
    rate, 1e-5). With learned parts it stays in eval mode, and the teacher is a copy of what it was.

    Under `accelerate launch` it runs on as many processes and machines as that says, each calling this with the same
    arguments. mixed_precision: "bf16" or "fp16", None as accelerate is set up.

    Returns what `tokenprune.patch(model, method, weights=...)` takes, and where the model's own weights are all that
    learns, parts without tensors, which say in `found` how those were trained; `model.json` beside `model.safetensors`
    says it then. But for its trained weights the model is left as it is.

    Raises:
        BudgetError: `flops` is no share in (0, 1], or one that the method cannot meet; a number of epochs, images,
            batches, steps or workers, or the seed, is none or out of its range.
        UnsupportedMethod: the method learns nothing, or cannot be on the model. UnsupportedModel: no image tower with a
            classifier.
        TokenPruneError: no images, fewer than a step takes, no labels, a state of another training or of other images,
            labels or weights, or one that not all processes find, a loss that is not finite (the state then stays the
            last one that was written).
    """
    tuned, recipe = recipe_of(method, options)
    check_output(output)
    check_written(options)
    seed = checked_count("seed", seed, smallest=0, largest=LARGEST_SEED, example=0)
    workers = checked_count("workers", workers, smallest=0, largest=MOST_WORKERS, example=4)
    learning_rate = checked_weight("learning_rate", learning_rate, example=1.0)
    if learning_rate == 0:
        raise TokenPruneError("learning_rate=0: nothing would be learned; it is times the paper's, learning_rate=1")
    distill = Distillation(
        checked_weight("distill_logits", recipe.distill_logits if distill_logits is None else distill_logits),
        checked_weight("distill_tokens", recipe.distill_tokens if distill_tokens is None else distill_tokens),
    )
    own = checked_weight("model_rate", recipe.model_rate if model_rate is None else model_rate, example=1e-5)
    if tuned:
        check_tuning(method, flops, distill, own)
        start = described(model, method, options)
    else:
        flops = checked_share("flops", flops)
        start = start_of(model, method, flops, seed, distill, own, options)
    data = labelled_images(images, model, transform, split)
    accelerator = accelerator_of(mixed_precision, checked_count("accumulate", accumulate, smallest=1, example=1))
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
    written = {
        "method": method,
        "options": dict(options),
        "flops": flops,
        "epochs": epochs,
        "batch_size": batch,
        "processes": processes,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "distill_logits": distill.logits,
        "distill_tokens": distill.tokens,
        "model_rate": own,
        "opt": recipe.opt if opt is None else opt,
        "sched": recipe.sched if sched is None else sched,
        "mixed_precision": accelerator.mixed_precision,
        "seed": seed,
        "data": data.name,
        "images": data.size,
        "labels": "maps" if data.dense else "classes",
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
    seeded = seed + accelerator.process_index
    identity = None
    if output is not None:
        identity = {"data": of_data(data, seed, workers), "weights": of_weights(model.state_dict().values())}
    with ExitStack() as stack:
        taught: Taught | Tuned
        if flops is None:
            stack.enter_context(tuning(model, method, options, accelerator.device, seeded))
            taught = Tuned(model, recipe.smoothing)
        else:
            asked = session_options(make_method(method, options), options, flops, start)
            teacher = twin(model).to(accelerator.device) if distill and own else None
            patch = stack.enter_context(
                session(model, method, asked, start, data, accelerator.device, seeded, frozen=not own)
            )
            taught = Taught(
                model,
                patch,
                last=last_block(model, patch),
                width=int(start.architecture["width"]),
                flops=flops,
                smoothing=recipe.smoothing,
                distill=distill,
                across=partial(accelerator.reduce, reduction="mean"),
                teacher=None if teacher is None else (teacher, last_block(teacher, patch)),
            )
        work = Work(
            taught,
            accelerator,
            start,
            written,
            paper=recipe,
            steps=per_epoch * epochs,
            per_epoch=per_epoch,
            identity=identity,
        )
        state = None if output is None else Path(output) / FILE
        if state is not None:
            work.resume(state, data, workers)
        order.start = work.step * accumulate
        taken = loader(data.by_number(), order, workers=workers)
        work.run(taken, state, accumulate=accumulate, save_every=save_every, show=show_progress)
        parts = work.parts()
    if tuned:
        return parts
    if own:
        parts = replace(parts, norms=norms_of(model))
    items = ByTurn(data.by_number(), seed)
    sample = torch.stack([items[epochs - 1, image][0] for image in range(min(data.size, MEASURED))])
    parts = on_budget(model, parts, sample.to(device_of(model)), batch)
    if output is not None and accelerator.is_main_process:
        parts.save(output)
    accelerator.wait_for_everyone()
    return parts
