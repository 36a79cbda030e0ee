"""Exchanging a block's class beneath whatever has replaced its `forward` on the instance.

Offloading (accelerate) and caches (diffusers' hooks) put a `forward` on the instance that calls the one they found; a
class exchanged later is then never called, and a native hook runs outside of theirs. So the class is exchanged, and
where the old class's method is held by such a chain, the new class's takes its place in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from tokenprune.adapters.swapping import Mixin, mixed
from tokenprune.denoisers.site import run_here
from tokenprune.errors import UnsupportedModel


class TokenBlock(Mixin):
    """A block in front of which stands the site of a patch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return run_here(self, super().forward, args, kwargs)

    @classmethod
    def _tokenprune_exchange(cls, module: nn.Module) -> None:
        _exchange(module, cls)

    @staticmethod
    def _tokenprune_restore(module: nn.Module) -> None:
        _exchange(module, original_class(module))


def token_block(original: type[nn.Module]) -> type[nn.Module]:
    """The block class with a site in front, known to diffusers' caches as what the original is."""
    cls = mixed(TokenBlock, original)
    registry = TransformerBlockRegistry
    registry._register()
    if original in registry._registry:
        registry._registry[cls] = registry._registry[original]
    return cls


def expose(module: nn.Module) -> None:
    """Put a site in front of a part of a block."""
    _exchange(module, token_block(original_class(module)))


def _exchange(module: nn.Module, cls: type[nn.Module]) -> None:
    if type(module) is cls:
        return
    old, held = type(module).forward, list(_holders(module))
    replaced = False
    for holder, name in held:
        method = _get(holder, name)
        if isinstance(method, MethodType) and method.__self__ is module and method.__func__ is old:
            _set(holder, name, MethodType(cls.forward, module))
            replaced = True
    if "forward" in vars(module) and not replaced:
        raise UnsupportedModel(
            f"the forward of a {type(module).__name__} is replaced on the instance by something that is not known;"
            " patch the model first, then switch that on"
        )
    module.__class__ = cls


def _holders(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where a chain of replaced forwards may hold the block's own."""
    yield vars(module), "forward"
    yield vars(module), "_old_forward"
    for reference in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, whether or not it has been exchanged."""
    cls: type[nn.Module] = getattr(type(module), "_tokenprune_original", type(module))
    return cls
