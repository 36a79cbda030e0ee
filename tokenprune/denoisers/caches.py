"""Caches of the host's that give what a module put out at an earlier step, and a patch beneath them.

A cache of whole blocks sees the full grid, and works. One inside of a block has kept the output for the tokens that an
earlier step computed, and the step at hand computes others: it is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tokenprune.denoisers.host import BlockFacts, Remembers
from tokenprune.errors import UnsupportedMethod

Watched = Mapping[str, tuple[str, ...] | None]


def watched(
    model: nn.Module, blocks: Iterable[BlockFacts], narrowed: Callable[[BlockFacts], list[nn.Module] | None]
) -> Watched:
    """{name of a block in the model: names of its children that run on fewer tokens than the block}, None where no
    cache may be on the block itself either."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, tuple[str, ...] | None] = {}
    for facts in blocks:
        parts = narrowed(facts)
        known = None if parts is None else {id(part) for part in parts}
        children = facts.module.named_children()
        inside = None if known is None else tuple(name for name, child in children if id(child) in known)
        found[names[id(facts.module)]] = inside
    return found


class CacheWatch:
    """Raises where a cache is on a module that must not have one.

    remembers: see `DenoiserHost`. Which modules there are is found anew when a run begins, and held weakly: to walk
    through those of SDXL takes the host a millisecond.
    """

    def __init__(self, watch: Watched, remembers: Remembers, method: str) -> None:
        self.watch, self.remembers, self.method = watch, remembers, method
        self.found: list[weakref.ref[nn.Module]] = []

    def refuse(self, model: nn.Module, *, anew: bool) -> None:
        """anew: whether modules may have come or gone since the last call.

        Raises:
            UnsupportedMethod: there is a cache.
        """
        if self.remembers(self._modules(model, anew)) is None:
            return
        for name, parts in self.watch.items():
            cache = self.remembers(self._inside(model, name))
            if cache is not None and parts is None:
                raise UnsupportedMethod(
                    f"{self.method} takes values of earlier steps, and so does {cache} in {name}; call disable_cache()"
                )
            if cache is not None:
                raise UnsupportedMethod(
                    f"{cache} gives what a part of {name} put out at an earlier step, for other tokens than those that"
                    f" {self.method} computes at this one; call disable_cache(), or take a cache of whole blocks, such"
                    " as FirstBlockCacheConfig or MagCacheConfig"
                )

    def _modules(self, model: nn.Module, anew: bool) -> list[nn.Module]:
        compiling = torch.compiler.is_compiling()  # which cannot call a weak reference to a module
        if not (anew or compiling):
            modules = [module for ref in self.found if (module := ref()) is not None]
            if modules and len(modules) == len(self.found):
                return modules
        modules = [module for name in self.watch for module in self._inside(model, name)]
        if not compiling:
            self.found = [weakref.ref(module) for module in modules]
        return modules

    def _inside(self, model: nn.Module, name: str) -> Iterator[nn.Module]:
        block, parts = submodule(model, name), self.watch[name]
        assert block is not None
        return _all_inside([block] if parts is None else [block._modules[part] for part in parts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found": []}


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, None where there is none. `get_submodule` takes twenty times as long, and every forward
    asks for all blocks."""
    module: nn.Module | None = model
    for part in filter(None, name.split(".")):
        module = None if module is None else module._modules.get(part)
    return module


def _all_inside(modules: list[nn.Module | None]) -> Iterator[nn.Module]:
    left = list(modules)
    while left:
        module = left.pop()
        if module is not None:
            yield module
            left.extend(module._modules.values())
