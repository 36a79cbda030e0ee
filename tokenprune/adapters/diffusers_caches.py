"""diffusers' caches: hooks that keep what a module put out at an earlier step."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def cache_on(modules: Iterable[nn.Module]) -> str | None:
    """The class of the first hook on these modules that keeps something over steps, None where there is none."""
    for module in modules:
        registry = module.__dict__.get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            if hook._is_stateful:
                return type(hook).__name__
    return None
