"""What the cache of a pruned prompt remembers: which tokens of the prompt its entries are.

It is kept by the cache itself, so that it lives as long, and follows it when it is copied. Outside of the language
model a cache says how many tokens it has seen, as generation slices prompts and counts positions by that; masks are
made for the entries that it has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedModel
from tokenprune.kernels.merge import gather


@dataclass(frozen=True)
class CacheMap:
    """index: [B, P] token of the prompt that each entry is, False in valid [B, P] where it is padding. length: tokens
    of the prompt. removed: tokens of the prompt without an entry, length - P. shift: [.., B, 1] by how much positions
    are lower than in the prompt (renumbered ones), None for not at all. padded: whether any entry is padding."""

    index: Tensor
    valid: Tensor
    length: int
    shift: Tensor | None = None
    padded: bool = False

    @property
    def entries(self) -> int:
        """P."""
        return self.index.shape[1]

    @property
    def removed(self) -> int:
        """Tokens of the prompt that have no entry."""
        return self.length - self.entries

    def mask(self, mask: Tensor) -> Tensor:
        """A mask [B, tokens] for the entries."""
        prompt = gather(mask[:, : self.length], self.index) * self.valid.to(mask.dtype)
        return torch.cat([prompt, mask[:, self.length :]], 1)

    def without_last(self, tokens: int) -> CacheMap:
        """The map of a cache that has lost the prompt's last tokens, as where a candidate is turned down."""
        last = torch.arange(self.length - tokens, self.length, device=self.index.device)
        if tokens >= self.entries or not bool((self.index[:, -tokens:] == last).all()):
            raise UnsupportedModel(
                f"a cache cannot be cropped by {tokens} tokens into a prompt of which some are not in it; crop less, or"
                " run the prompt anew"
            )
        return replace(self, index=self.index[:, :-tokens], valid=self.valid[:, :-tokens], length=self.length - tokens)

    def rows(self, index: Tensor) -> CacheMap:
        """The map of other samples, rows of this one."""
        shift = self.shift if self.shift is None else self.shift.index_select(-2, index)
        return replace(self, index=self.index[index], valid=self.valid[index], shift=shift)


def identity_map(batch: int, entries: int, device: torch.device) -> CacheMap:
    """The map of a cache that has every token."""
    index = torch.arange(entries, device=device).expand(batch, -1)
    return CacheMap(index, torch.ones_like(index, dtype=torch.bool), entries)


class _PrunedCache:
    """In front of a cache class."""

    _tokenprune_map: CacheMap
    _tokenprune_original: type
    _tokenprune_followed = False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        known = self._tokenprune_map
        if not self._tokenprune_followed and (known.padded or known.shift is not None):
            raise UnsupportedModel(
                "this cache was made under a patch behind the image tower, and goes on without it: masks and positions"
                " would be those of the whole prompt; patch the model again, or run the prompt anew"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_blank, (self._tokenprune_original,), *reduced[2:])

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        entries = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return entries + self._tokenprune_map.removed if _holds(entries, self._tokenprune_map) else entries

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        batch = self._tokenprune_map.index.shape[0]
        index = torch.arange(batch, device=self._tokenprune_map.index.device).repeat_interleave(repeats)
        self._tokenprune_map = self._tokenprune_map.rows(index)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._tokenprune_map = self._tokenprune_map.rows(indices.to(self._tokenprune_map.index.device))

    def crop(self, tokens_to_remove: int) -> None:
        known = self._tokenprune_map
        gone = abs(tokens_to_remove) - (super().get_seq_length() - known.entries)  # type: ignore[misc]
        if gone > 0:
            self._tokenprune_map = known.without_last(gone)
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.__class__ = self._tokenprune_original
        del self._tokenprune_map


_CLASSES: dict[type, type] = {}


def _pruned(cls: type) -> type:
    """The cache class `cls` with `_PrunedCache` in front, the same one each time."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (_PrunedCache, cls), {"_tokenprune_original": cls})
    return _CLASSES[cls]


def _blank(original: type) -> Any:
    cls: Any = _pruned(original)
    return cls.__new__(cls)


def remember_map(cache: Any, known: CacheMap) -> None:
    """Tie a map to a cache."""
    if not isinstance(cache, _PrunedCache):
        cache.__class__ = _pruned(type(cache))
    cache._tokenprune_map = known


def follow(cache: Any, now: bool) -> None:
    """Say of a cache whether its map is followed from here on."""
    if isinstance(cache, _PrunedCache):
        cache._tokenprune_followed = now


def map_of(cache: Any) -> CacheMap | None:
    """The map of a cache, None where it has every token of its prompt."""
    known: CacheMap | None = getattr(cache, "_tokenprune_map", None)
    return known if known is not None and _holds(cache.get_query_offset(), known) else None


def entries_of(cache: Any) -> int:
    """Entries of a cache's first layer."""
    return 0 if cache is None else int(cache.get_query_offset())


def _holds(entries: Any, known: CacheMap) -> bool:
    return bool(entries >= known.entries)
