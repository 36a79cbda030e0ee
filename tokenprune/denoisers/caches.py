"""Caches of the host's that give what a module put out at an earlier step, and a patch beneath them.

A cache of whole blocks sees the full grid, and works. One inside of a block has kept the output for the tokens that an
earlier step computed, and the step at hand computes others: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn

from tokenprune.denoisers.host import BlockFacts
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


def refuse_caches(model: nn.Module, watch: Watched, remembers: Callable[[nn.Module], str | None], method: str) -> None:
    """Raise where a cache is on a module that must not have one.

    Raises:
        UnsupportedMethod: it is.
    """
    for name, parts in watch.items():
        block = submodule(model, name)
        assert block is not None
        inside: list[nn.Module | None] = [block] if parts is None else [block._modules[part] for part in parts]
        for module in _all_inside(inside):
            cache = remembers(module)
            if cache is None:
                continue
            if parts is None:
                raise UnsupportedMethod(
                    f"{method} takes values of earlier steps, and so does {cache} in {name}; call disable_cache()"
                )
            raise UnsupportedMethod(
                f"{cache} gives what a part of {name} put out at an earlier step, for other tokens than those that"
                f" {method} computes at this one; call disable_cache(), or take a cache of whole blocks, such as"
                " FirstBlockCacheConfig or MagCacheConfig"
            )


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
