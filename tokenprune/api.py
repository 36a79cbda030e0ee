"""The public verbs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from tokenprune import registry
from tokenprune.budget import parse_budget
from tokenprune.defaults import default_choices
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel, UntrainedMethod
from tokenprune.family import AppliedPatch, Family, Request, active_patches, composes, detach, replaced_by
from tokenprune.finding import active_on, bare, find_models, modules_of, patches_on, reattach
from tokenprune.latency import load_table, told_speed
from tokenprune.learned_parts import LearnedParts, load_learned
from tokenprune.method import Method
from tokenprune.method_families import shipped_table
from tokenprune.recording import Recording
from tokenprune.registry import MethodInfo
from tokenprune.report import Report
from tokenprune.stored_schedule import StoredSchedule, load_schedule

Target = TypeVar("Target")


def patch(
    target: Target,
    method: str | None = None,
    *,
    keep: float | None = None,
    flops: float | None = None,
    tokens: int | None = None,
    schedule: Mapping[int | str, float] | StoredSchedule | str | PathLike[str] | None = None,
    prefix_only_last: bool = True,
    restore: str | None = None,
    steps: Any = None,
    positions: str | None = None,
    require_speedup: bool = False,
    weights: LearnedParts | str | PathLike[str] | None = None,
    **options: Any,
) -> Target:
    """Make `target` compute fewer tokens, in place, and return it.

    target: a timm vision transformer or an image tower of transformers, or a module that holds one; a vision-language
    model of transformers; a diffusers pipeline, or its `unet` or `transformer`. method: a name of `methods()`; None
    takes the best one of the shipped table for this family and budget (docs/methods.md), and the report says which and
    why. One budget at most, none is the method's published setting:

    keep: share in (0, 1] of the prunable tokens (never class, register or other prefix tokens) that leave the last
    place. flops: share in (0, 1] of the unpatched multiply-adds of a forward, scoring counted, met within 1%.
    tokens: prunable tokens leaving the last place. schedule: {block: share of the entering tokens that leave}, or one
    that was found: what `tokenprune.search` or `tokenprune.calibrate` returns, its file, or the name of a shipped one;
    method, options and restore are then its.

    prefix_only_last: where nothing but prefix tokens is read behind the last block (a class-token head, no feature map
    asked for), run its queries and MLP on them alone: the same output but for rounding, with fewer multiply-adds, which
    count towards a flops budget. It is left off at a budget of 1.0, in a forward that is recorded, and while there is a
    hook on the last block, on a part of it, or on the norm behind it, which would see the other tokens missing (add
    such a hook before compiling). What the method itself would do in that block is then done in a recording only, as
    nothing depends on it. Dense outputs (`forward_features`, `forward_intermediates`) still have every token, and so
    cost more than the forward that a flops budget is about: switch this off where they are what is run.

    restore: of an image tower, what stands for a token that left, where the full grid is read (a mean over patches, or
    a dense output); None is the method's own. "unmerge": a merged token takes its group's value. "regression": an
    estimate from all kept tokens, by similarity. "feature": the kept token that was most similar when it left. "place":
    the one nearest in the image. "fusion": all tokens come back, as they were when they left, in front of the last
    block, which runs on all of them in every forward and counts towards a flops budget as such (last-layer fusion,
    Bergner et al., "Token Cropr", CVPR 2025). What a method drops beside merging is regressed under "unmerge", and what
    it merges counts as left under the other names.

    steps: of a denoising run, how strongly each part of it is reduced, see `tokenprune.denoisers.steps.parse_steps`;
    None is the method's own. Of a denoiser `keep` is the share computed in each stack of blocks, behind which all
    tokens are back; `flops` is meant over the whole run, and `schedule` names stacks. Of a model of windows (Swin)
    `keep` is the share of the windows that each block computes, or of each window's tokens in its MLP.

    positions: of the visual tokens that a vision-language model keeps: their "original" ones (the default), or
    "reindex" to count through. There `tokens` are those of each image, and `flops` is of a prompt's prefill.

    require_speedup: raise where the latency table of this model on this device (`tokenprune bench --save-profile`)
    predicts no speed-up at one of its batch sizes and resolutions, or can predict none: there is no table, nothing is
    removed, or each image keeps a number of tokens of its own. Without it that is a warning, and where nothing is
    predicted the report says "speed not checked here" and why; nothing is timed here.

    weights: what a method that learns has learned for this model: what `tokenprune.train` returns, its folder or file
    (safetensors with JSON beside it), or the name of shipped ones. None takes the shipped ones of this very model.
    Options that are not named here are those that they were trained with, and with `weights` so is the budget.

    options: of the method, see `methods()`; one of them is a budget of its own (`r` of tome, `rate` of the others), and
    then the only one. An earlier patch of the same model is replaced. At another input size the
    budget is solved anew, at the first forward of that size.

    Raises:
        UnsupportedModel: nothing in `target` is recognised.
        UnsupportedMethod: the method, an option or its value is unknown, or the model lacks what the method needs.
        BudgetError: the budget is malformed or cannot be met; the message names what can be.
        SlowdownError: a speed-up was required, and is not predicted.
        TokenPruneError: learned parts that cannot be read, or are of another method or architecture.
    """
    if weights is not None:
        weights = load_learned(weights)
        method = weights.method if method is None else method
        options = {**weights.options, **options} if method == weights.method else options
    if schedule is not None and not isinstance(schedule, Mapping):
        stored = _found(schedule, method)
        method, options, schedule = stored.method, {**stored.options, **options}, stored.schedule
        restore = stored.restore if restore is None else restore
    named = registry.make_method(method, options) if method is not None else None
    if named is None and options:
        raise UnsupportedMethod(f"options {sorted(options)} need a method to belong to; name one")
    own = (named.schedule.option, options.get(named.schedule.option)) if named is not None else None
    budget = parse_budget(keep=keep, flops=flops, tokens=tokens, schedule=schedule, own=own)
    if budget.kind == "default" and weights is not None and named is not None and not named.adaptive:
        budget = parse_budget(flops=weights.found.get("flops"))  # what they were trained for
    if weights is not None and (named is None or named.learned is None):
        raise UnsupportedMethod(f"weights= are learned parts, and {method} learns nothing; leave them out")
    if schedule is not None and options.get("places") is not None:
        raise BudgetError("schedule= names the places itself; leave out places=")
    remade = partial(_remade, method, options) if method is not None else None
    request = Request(budget, steps, target, prefix_only_last, positions, restore, weights, remade)
    found = [(model, family, replaced_by(family, model)) for model, family in find_models(target)]
    for model, _, earlier in found:
        detach(model, earlier)
    try:
        prepared = [
            family.prepare(model, named, request) if named is not None else _prepare_default(family, model, request)
            for model, family, _ in found
        ]
        for (model, family, _), one in zip(found, prepared, strict=True):
            table = load_table(model)
            predicted = {} if table is None else one.predicted(table)
            steady = table is None or bool(table.environment.get("trusted", True))
            unknown = one.unpredictable()
            one.speed, warning = told_speed(predicted, required=require_speedup, steady=steady, unknown=unknown)
            if warning:
                warnings.warn(warning, stacklevel=2)
            family.attach(model, one)
    except BaseException:
        for model, family, earlier in found:
            detach(model, replaced_by(family, model))
            reattach(model, family, earlier)
        raise
    for (_, _, earlier), one in zip(found, prepared, strict=True):
        for replaced in earlier.values():
            one.recordings += replaced.recordings
    _forget_compiled()
    return target


def unpatch(target: Target) -> Target:
    """Remove every patch on `target` and inside it, exactly; does nothing to an unpatched one. Returns `target`."""
    forget = False
    for module in modules_of(target):
        patches = active_patches(module)
        detach(module, patches)
        forget |= bool(patches)
    if forget:
        _forget_compiled()
    return target


@contextmanager
def patched(target: Target, method: str | None = None, **arguments: Any) -> Iterator[Target]:
    """`patch` for the length of a with block; an earlier patch is put back behind it."""
    found = [(model, family, replaced_by(family, model)) for model, family in find_models(target)]
    patch(target, method, **arguments)
    try:
        yield target
    finally:
        for model, family, earlier in found:
            detach(model, replaced_by(family, model))
            reattach(model, family, earlier)
        _forget_compiled()


def report(target: object) -> Report:
    """What was patched on `target`, where, and what it costs; `print` it or take `.to_dict()`.

    Raises:
        UnsupportedModel: `target` is not patched, or holds several models that are.
    """
    found = active_on(target)
    found = [patch for patch in found if composes(patch)] or found  # the whole's stands before those of its parts
    if len(found) > 1 and isinstance(target, nn.Module):
        raise UnsupportedModel(
            f"{type(target).__name__} holds {len(found)} patched models; ask for the report of each by itself"
        )
    return Report(found[0])


@contextmanager
def record(target: object) -> Iterator[Recording]:
    """Keep, for each forward in the with block, which original token went where.

    Compiled code of the whole process runs eagerly inside the block: a graph would have to be made anew for each
    forward. A patch that takes the place of this one in the block is recorded as well. A traced or exported program is
    a model of its own and is not seen.

    Raises:
        UnsupportedModel: `target` is not patched.
    """
    found = active_on(target)
    recording = Recording()
    for one in found:
        one.recordings.append(recording)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield recording
    finally:
        for one in (*found, *patches_on(target)):
            if recording in one.recordings:
                one.recordings.remove(recording)


def learned(target: object) -> nn.Module:
    """The learned parts of the patch on `target`, by block. They are none of the model's submodules, follow its device
    and are copied and pickled with it.

    Raises:
        UnsupportedModel: `target` is not patched, or by a method that learns nothing.
    """
    found = [parts for one in active_on(target) if (parts := getattr(one, "learned", None)) is not None]
    if len(found) != 1:
        raise UnsupportedModel(f"{len(found)} patches here have learned parts, such as patch(model, 'ltmp') loads")
    learned_parts: nn.Module = found[0]
    return learned_parts


def methods(target: object | None = None) -> list[MethodInfo]:
    """The methods, or those that work on `target`: name, paper, what each needs, families and options.

    families are the adapters by which a method of the package works on one of the models of its table of methods and
    families (docs/methods.md), or that of `target`.

    Raises:
        UnsupportedModel: nothing in `target` is recognised.
    """
    if target is None:
        table = shipped_table()
        return [registry.method_info(name, table.adapters_of(name)) for name in registry.method_names()]
    model, family = find_models(target)[0]
    request, usable = Request(parse_budget(keep=0.5), target=target, prefix_only_last=False), []
    with bare(model, family):
        for name in registry.method_names():
            try:
                family.prepare(model, registry.make_method(name, {}), request)
            except (BudgetError, UntrainedMethod):
                pass  # it works here with another budget, or once it is trained
            except UnsupportedMethod:
                continue
            usable.append(registry.method_info(name, (family.name,)))
    return usable


def _found(source: StoredSchedule | str | PathLike[str], method: str | None) -> StoredSchedule:
    """A schedule that a search or a calibration has found."""
    if not isinstance(source, (StoredSchedule, str, PathLike)):
        raise BudgetError(
            f"schedule must map blocks to shares or be one that was found, got {source!r}; for example"
            " {3: 0.7, 6: 0.7}"
        )
    stored = source if isinstance(source, StoredSchedule) else load_schedule(source)
    if method not in (None, stored.method):
        raise UnsupportedMethod(
            f"the schedule was found for {stored.method}, not for {method}; leave the method out, or hand over"
            f" schedule={dict(stored.schedule)} to use it with another"
        )
    return stored


def _remade(method: str, options: dict[str, Any], shipped: Mapping[str, Any]) -> Method:
    return registry.make_method(method, {**shipped, **options})


def _prepare_default(family: Family, model: nn.Module, request: Request) -> AppliedPatch:
    """The best method of the shipped table that this model can run, and whose budget it can meet."""
    refused: TokenPruneError | None = None
    for choice in default_choices(family.name, request.budget):
        try:
            patch = family.prepare(model, registry.make_method(choice.method, dict(choice.options)), request)
        except (UnsupportedMethod, BudgetError) as error:
            refused = refused if isinstance(refused, BudgetError) else error
            continue
        patch.chosen = f"{choice.method} was chosen for {family.name} and {request.budget}, from {choice.source}"
        return patch
    assert refused is not None
    raise refused


def _forget_compiled() -> None:
    """Drop compiled code: it was made without the hooks that changed, and would go on running."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and len(frames.input_codes.seen):
        torch._dynamo.reset()
