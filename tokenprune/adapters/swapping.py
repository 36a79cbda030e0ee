"""Exchanging a module's class for a subclass of it, so that it can be undone and survives pickle and look-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Subclass = TypeVar("Subclass", bound=type[nn.Module])
_MIXED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def named_as(original: type[nn.Module]) -> Callable[[Subclass], Subclass]:
    """Mark a module-level subclass as the stand-in of `original`: it takes its `__name__`, which hosts look up, and
    keeps its own `__qualname__`, which pickle looks up."""

    def decorate(subclass: Subclass) -> Subclass:
        subclass.__name__ = original.__name__
        subclass._tokenprune_original = original  # type: ignore[attr-defined]
        return subclass

    return decorate


class Mixin(nn.Module):
    """Behaviour put in front of any host class by `mixed`; instances pickle by (mixin, host class)."""

    _tokenprune_original: type[nn.Module]
    _tokenprune_mixin: type[Mixin]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_blank, (self._tokenprune_mixin, self._tokenprune_original), *reduced[2:])


def mixed(mixin: type[Mixin], original: type[nn.Module]) -> type[nn.Module]:
    """The class `original` with `mixin` in front, the same one each time."""
    if (mixin, original) not in _MIXED:
        _MIXED[mixin, original] = type(
            original.__name__,
            (mixin, original),
            {
                "__module__": original.__module__,
                "__doc__": original.__doc__,
                "_tokenprune_original": original,
                "_tokenprune_mixin": mixin,
            },
        )
    return _MIXED[mixin, original]


def _blank(mixin: type[Mixin], original: type[nn.Module]) -> nn.Module:
    cls = mixed(mixin, original)
    return cls.__new__(cls)
