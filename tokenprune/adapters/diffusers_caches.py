"""diffusers' caches: hooks that keep what a module put out at an earlier step."""

from __future__ import annotations

from torch import nn


def cache_on(module: nn.Module) -> str | None:
    """The class of the hook on a module that keeps something over steps, None where there is none."""
    registry = vars(module).get("_diffusers_hook")
    if registry is None:
        return None
    return next((type(hook).__name__ for hook in registry.hooks.values() if hook._is_stateful), None)
