"""The public verbs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from tokenprune import registry
from tokenprune.budget import Budget, parse_budget
from tokenprune.defaults import default_methods
from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.host import Adapter, Host
from tokenprune.patch import Patch, active_patch, attach, detach, prepare
from tokenprune.recording import Recording
from tokenprune.registry import MethodInfo
from tokenprune.report import Report

Target = TypeVar("Target")


def patch(
    target: Target,
    method: str | None = None,
    *,
    keep: float | None = None,
    flops: float | None = None,
    tokens: int | None = None,
    schedule: Mapping[int | str, float] | None = None,
    **options: Any,
) -> Target:
    """Make `target` compute fewer tokens, in place, and return it.

    target: a timm vision transformer or an image tower of transformers, or a module that holds one. method: a name of
    `methods()`; None takes the best one of the shipped table for this family and budget. One budget at most, none is
    the method's published setting:

    keep: share in (0, 1] of the prunable tokens (never class, register or other prefix tokens) that leave the last
    place. flops: share in (0, 1] of the unpatched multiply-adds of a forward, scoring counted, met within 1%.
    tokens: prunable tokens leaving the last place. schedule: {block: share of the entering tokens that leave}.

    options: of the method, see `methods()`. An earlier patch of the same model is replaced. At another input size the
    budget is solved anew, at the first forward of that size.

    Raises:
        UnsupportedModel: nothing in `target` is recognised.
        UnsupportedMethod: the method or an option is unknown, or the model lacks what it needs.
        BudgetError: the budget is malformed or cannot be met; the message names what can be.
    """
    budget = parse_budget(keep=keep, flops=flops, tokens=tokens, schedule=schedule)
    named = registry.make_method(method, options) if method is not None else None
    if named is None and options:
        raise UnsupportedMethod(f"options {sorted(options)} need a method to belong to; name one")
    model, adapter = _find(target)
    earlier = active_patch(model)
    detach(model, earlier)
    try:
        host = adapter.host(model)
        if named is not None:
            prepared = prepare(host, adapter, named, budget)
        else:
            prepared = _prepare_default(host, adapter, budget)
    except BaseException:
        _reattach(model, adapter, earlier)
        raise
    attach(host, prepared)
    _forget_compiled()
    return target


def unpatch(target: Target) -> Target:
    """Remove every patch on `target` and inside it, exactly; does nothing to an unpatched one. Returns `target`."""
    module = _module(target)
    found = active_patch(module)
    if found:
        detach(module, found)
        _forget_compiled()
    return target


@contextmanager
def patched(target: Target, method: str | None = None, **arguments: Any) -> Iterator[Target]:
    """`patch` for the length of a with block; an earlier patch is put back behind it."""
    module = _module(target)
    earlier = active_patch(module)
    patch(target, method, **arguments)
    try:
        yield target
    finally:
        unpatch(target)
        if earlier:
            model, adapter = _find(target)
            _reattach(model, adapter, earlier)


def report(target: object) -> Report:
    """What was patched on `target`, where, and what it costs; `print` it or take `.to_dict()`.

    Raises:
        UnsupportedModel: `target` is not patched.
    """
    found = active_patch(_module(target))
    if not found:
        raise UnsupportedModel("nothing here is patched; call tokenprune.patch(model, flops=0.6) first")
    return Report(next(iter(found.values())))


@contextmanager
def record(target: object) -> Iterator[Recording]:
    """Keep, for each forward in the with block, which original token went where.

    Compiled code of the whole process runs eagerly inside the block: a graph would have to be made anew for each
    forward. A traced or exported program is a model of its own and is not seen.

    Raises:
        UnsupportedModel: `target` is not patched.
    """
    found = active_patch(_module(target))
    if not found:
        raise UnsupportedModel("nothing here is patched; call tokenprune.patch(model, flops=0.6) first")
    recording = Recording()
    for one in found.values():
        one.recordings.append(recording)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield recording
    finally:
        for one in found.values():
            one.recordings.remove(recording)


def methods(target: object | None = None) -> list[MethodInfo]:
    """The methods, or those that work on `target`: name, paper, what each needs, families and options.

    Raises:
        UnsupportedModel: nothing in `target` is recognised.
    """
    families = tuple(adapter.name for adapter in registry.adapters()) or ("timm_vit",)
    if target is None:
        return [registry.method_info(name, families) for name in registry.method_names()]
    model, adapter = _find(target)
    earlier = active_patch(model)
    detach(model, earlier)
    try:
        host, usable = adapter.host(model), []
        for name in registry.method_names():
            try:
                prepare(host, adapter, registry.make_method(name, {}), parse_budget(keep=0.5))
            except UnsupportedMethod:
                continue
            usable.append(registry.method_info(name, (adapter.name,)))
    finally:
        _reattach(model, adapter, earlier)
    return usable


def _module(target: object) -> nn.Module:
    if isinstance(target, torch.jit.ScriptModule):
        raise UnsupportedModel("a TorchScript module cannot be patched; patch the eager model and trace that")
    if not isinstance(target, nn.Module):
        raise UnsupportedModel(f"expected a torch module, got {type(target).__name__}")
    return target


def _find(target: object) -> tuple[nn.Module, Adapter]:
    module = _module(target)
    module = getattr(module, "_orig_mod", module)
    for adapter in registry.adapters():
        model = adapter.find(module)
        if model is not None:
            return model, adapter
    raise UnsupportedModel(
        f"no adapter knows {type(module).__name__} or a module inside it; supported: timm vision transformers"
        " (VisionTransformer, DeiT, BEiT, EVA, hybrid, relative-position, CaiT, NaFlexViT) and transformers' image"
        " towers (CLIP, SigLIP, ViT, DeiT, BEiT, DINOv2, DINOv3); others through tokenprune.register_adapter"
    )


def _prepare_default(host: Host, adapter: Adapter, budget: Budget) -> Patch:
    """The best method of the shipped table that this model can run."""
    ranked = default_methods(adapter.name, budget)
    for name in ranked[:-1]:
        try:
            return prepare(host, adapter, registry.make_method(name, {}), budget)
        except UnsupportedMethod:
            continue
    return prepare(host, adapter, registry.make_method(ranked[-1], {}), budget)


def _reattach(model: nn.Module, adapter: Adapter, patches: Mapping[str, Patch]) -> None:
    for earlier in patches.values():
        attach(adapter.host(model), earlier)


def _forget_compiled() -> None:
    """Drop compiled code: it was made without the hooks that changed, and would go on running."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and len(frames.input_codes.seen):
        torch._dynamo.reset()
