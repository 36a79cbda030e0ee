"""Family: the small protocol behind the public verbs, one implementation for each kind of model.

A family prepares, attaches and describes patches of its own kind; finding and removing them is the same for all. A
patch is carried by native hooks whose owner is the patch or has it as `.patch`, and by classes with
`_tokenprune_original`.

A patch that `composes` leaves alone what is patched in a part of its model, and comes off apart from it: it owns the
hooks on its model itself, those on parts belong to objects that have it as `.patch`, classes that it exchanged have its
adapter as `_tokenprune_adapter`, and `release()` removes what is outside of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenprune.budget import Budget
from tokenprune.latency import NOT_CHECKED, LatencyTable
from tokenprune.method import Method
from tokenprune.recording import Recording


@dataclass(frozen=True)
class Request:
    """What `patch` was asked for, beside the method. steps: over the steps of a denoising run, as given. target: what
    the caller patched, a module or a pipeline. prefix_only_last: see `tokenprune.patch`, of image towers. positions: of
    the visual tokens that a vision-language model keeps, None for its default. restore: see `tokenprune.patch`, of
    image towers, None for the method's own. weights: learned parts, as given. remade: other options -> the method with
    these where the caller named none."""

    budget: Budget
    steps: Any = None
    target: object = None
    prefix_only_last: bool = True
    positions: str | None = None
    restore: str | None = None
    weights: object = None
    remade: Callable[[Mapping[str, Any]], Method] | None = None


class AppliedPatch(Protocol):
    """One method on one model, for as long as it is on."""

    adapter: str
    recordings: list[Recording]
    speed: str
    chosen: str

    def predicted(self, table: LatencyTable) -> dict[tuple[int, int], float]:
        """Time at each (batch, prunable tokens) of `table`, as a share of the unpatched one, where that is known."""

    def unpredictable(self) -> str:
        """Why no table says how long it takes, and what to do; empty where one could."""

    def summary(self) -> dict[str, Any]:
        """The data of `Report.to_dict`."""


class Portable:
    """What a patch is when it is copied or pickled with its model. speed: what is known of it, for the report. chosen:
    why this method, where none was named.

    Hooks are pickled with their numbers, and another process counts its own from 0: one of the user's would take the
    place of one of the patch's. So counting goes on above them where a patch is loaded.
    """

    budget: Budget
    method: Method
    speed = NOT_CHECKED
    chosen = ""

    def predicted(self, table: LatencyTable) -> dict[tuple[int, int], float]:
        """As in `AppliedPatch`; nothing is known of most kinds."""
        return {}

    def unpredictable(self) -> str:
        """As in `AppliedPatch`."""
        name = self.method.name
        if self.budget.is_full:
            return f"{self.budget} removes nothing, so nothing is faster; use a smaller budget"
        if self.method.training_only:
            return f"{name} acts in training forwards alone; use a method that acts in eval mode"
        if not self.method.adaptive:
            return ""
        fixed = "a method that keeps the same number of tokens in every image, such as 'top_k'"
        if self.method.learned is not None:
            fixed = f"the fixed numbers that tokenprune.calibrate(model, images, {name!r}, ...) finds"
        return f"{name} keeps as many tokens as each image needs, which is not known before it has run; use {fixed}"

    def left_behind(self) -> dict[str, Any]:
        """The attributes that a copy does not share, and what it begins with."""
        return {"recordings": []}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **self.left_behind(), "next_hook": RemovableHandle.next_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RemovableHandle.next_id = max(RemovableHandle.next_id, state["next_hook"])
        self.__dict__.update({name: value for name, value in state.items() if name != "next_hook"})


class Family(Protocol):
    """A kind of model, as the verbs see it."""

    name: str

    def find(self, target: object) -> nn.Module | None:
        """The model of this family that is `target` or inside it, or None."""

    def prepare(self, model: nn.Module, method: Method, request: Request) -> AppliedPatch:
        """The patch, its budget solved as far as the sizes are known; nothing is attached yet.

        Raises:
            UnsupportedModel, UnsupportedMethod, BudgetError: it cannot be.
        """

    def attach(self, model: nn.Module, patch: Any) -> None:
        """Put a prepared patch on the model."""


def active_patches(module: nn.Module) -> dict[str, AppliedPatch]:
    """Patches on `module` and inside it, by the name of the first module they hook."""
    found: dict[str, AppliedPatch] = {}
    for name, child in module.named_modules():
        for hook in child._forward_pre_hooks.values():
            patch = patch_of(hook)
            if composes(patch) and getattr(hook, "__self__", None) is not patch:
                continue  # of a patch of the model that this is a part of
            if patch is not None and all(patch is not known for known in found.values()):
                found[name] = patch
    return found


def replaced_by(family: Family, module: nn.Module) -> dict[str, AppliedPatch]:
    """Those of `active_patches` that a patch of `family` takes the place of."""
    return {name: p for name, p in active_patches(module).items() if composes(p) == composes(family)}


def composes(one: object) -> bool:
    """Whether a patch, or the patches of a family, stand beside those of the model's parts."""
    return bool(getattr(one, "composes", False))


def detach(module: nn.Module, patches: Mapping[str, AppliedPatch]) -> None:
    """Remove every hook and class of `patches` from `module` and inside it."""
    owned = {id(patch) for patch in patches.values()}
    marked = {patch.adapter for patch in patches.values() if composes(patch)}
    unmarked = any(not composes(patch) for patch in patches.values())
    for child in module.modules():
        _remove_hooks(child._forward_pre_hooks, owned, child._forward_pre_hooks_with_kwargs)
        _remove_hooks(child._forward_hooks, owned, child._forward_hooks_with_kwargs, child._forward_hooks_always_called)
        if getattr(type(child), "_tokenprune_original", None) is None:
            continue
        owner = getattr(type(child), "_tokenprune_adapter", None)
        if unmarked if owner is None else owner in marked:
            restore_class(child)
    for patch in patches.values():
        if composes(patch):
            patch.release()  # type: ignore[attr-defined]


def restore_class(module: nn.Module) -> None:
    """Give a module whose class was exchanged its own class back, in the way in which it was exchanged."""
    cls: Any = type(module)
    restore = getattr(cls, "_tokenprune_restore", None)
    if restore is not None:
        restore(module)
    else:
        module.__class__ = cls._tokenprune_original


def patch_of(hook: Any) -> Any:
    """The patch that a hook belongs to, None for a hook of another kind."""
    owner = getattr(hook, "__self__", None)
    patch = getattr(owner, "patch", owner)
    return patch if hasattr(patch, "summary") and hasattr(patch, "recordings") else None


def _remove_hooks(hooks: dict[int, Any], owned: set[int], *extra: dict[int, Any]) -> None:
    for key, hook in list(hooks.items()):
        if id(patch_of(hook)) in owned:
            for table in (hooks, *extra):
                table.pop(key, None)
