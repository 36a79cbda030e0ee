"""What the cache of a pruned prompt remembers: which tokens of the prompt its entries are, or those of its layers.

It is kept by the cache itself, so that it lives as long, and follows it when it is copied. Outside of the language
model a cache says how many tokens it has seen, as generation slices prompts and counts positions by that; masks are
made for the entries that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

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


@dataclass(frozen=True)
class StageMap:
    """What the caches of the layers from `place` on hold of a prompt of `length` tokens: index [B, P], False in valid
    [B, P] where an entry is padding (padded: anywhere)."""

    place: int
    index: Tensor
    valid: Tensor
    length: int
    padded: bool

    def rows(self, index: Tensor) -> StageMap:
        """The map of other samples, rows of this one."""
        index = index.to(self.index.device)
        return replace(self, index=self.index[index], valid=self.valid[index])


class _PrunedCache:
    """In front of a cache class. Of a cache that lost tokens behind the tower it holds a map, of one that lost tokens
    between layers stages, and which of the two the forward follows that runs now."""

    _tokenprune_map: CacheMap | None = None
    _tokenprune_stages: Sequence[StageMap] = ()
    _tokenprune_original: type
    _tokenprune_followed: Literal["map", "stages"] | None = None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        known = self._tokenprune_map
        if self._tokenprune_followed != "map" and known is not None and (known.padded or known.shift is not None):
            raise UnsupportedModel(
                "this cache was made under a patch behind the image tower, and goes on without it: masks and positions"
                " would be those of the whole prompt; patch the model again, or run the prompt anew"
            )
        if self._tokenprune_followed != "stages" and self._tokenprune_stages:
            raise UnsupportedModel(
                "this cache was made under a patch between layers, and goes on without it: masks would be those of the"
                " first layer, which has more entries than others; patch the model again, or run the prompt anew"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_blank, (self._tokenprune_original,), *reduced[2:])

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        entries, known = super().get_seq_length(layer_idx), self._tokenprune_map  # type: ignore[misc]
        return entries + known.removed if known is not None and _holds(entries, known) else entries

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._take(lambda batch: torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take(lambda batch: indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take(lambda batch: beam_idx)

    def _take(self, rows: Callable[[int], Tensor]) -> None:
        """Go on with other samples: rows of this batch, by its size."""
        known = self._tokenprune_map
        if known is not None:
            self._tokenprune_map = known.rows(rows(len(known.index)).to(known.index.device))
        if self._tokenprune_stages:
            index = rows(len(self._tokenprune_stages[0].index))
            self._tokenprune_stages = [stage.rows(index) for stage in self._tokenprune_stages]

    def crop(self, tokens_to_remove: int) -> None:
        known = self._tokenprune_map
        if known is not None:
            gone = abs(tokens_to_remove) - (super().get_seq_length() - known.entries)  # type: ignore[misc]
            if gone > 0:
                self._tokenprune_map = known.without_last(gone)
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.__class__ = self._tokenprune_original
        for name in ("_tokenprune_map", "_tokenprune_stages", "_tokenprune_followed"):
            self.__dict__.pop(name, None)


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
    _made_pruned(cache)._tokenprune_map = known


def remember_stages(cache: Any, stages: Sequence[StageMap]) -> None:
    """Tie stages to a cache."""
    _made_pruned(cache)._tokenprune_stages = list(stages)


def _made_pruned(cache: Any) -> Any:
    if not isinstance(cache, _PrunedCache):
        cache.__class__ = _pruned(type(cache))
    return cache


def follow(cache: Any, now: Literal["map", "stages"] | None) -> None:
    """Say of a cache what is followed of it from here on."""
    if isinstance(cache, _PrunedCache):
        cache._tokenprune_followed = now


def stages_of(cache: Any) -> Sequence[StageMap]:
    """What a cache says of its prompt; nothing where the prompt is not in it any more."""
    stages: Sequence[StageMap] = getattr(cache, "_tokenprune_stages", ())
    seen = int(cache.get_seq_length())
    if stages and 0 < seen < stages[0].length:
        raise UnsupportedModel(
            f"the cache was cropped to {seen} of its prompt's {stages[0].length} tokens (assisted generation and prompt"
            " lookup do so), which layers that have lost tokens cannot follow; generate without, or use a method that"
            " works behind the tower, such as 'top_k'"
        )
    if not seen and stages:
        cache._tokenprune_stages = ()
    return stages if seen else ()


def map_of(cache: Any) -> CacheMap | None:
    """The map of a cache, None where it has every token of its prompt."""
    known: CacheMap | None = getattr(cache, "_tokenprune_map", None)
    return known if known is not None and _holds(cache.get_query_offset(), known) else None


def entries_of(cache: Any) -> int:
    """Entries of a cache's first layer."""
    return 0 if cache is None else int(cache.get_query_offset())


def _holds(entries: Any, known: CacheMap) -> bool:
    return bool(entries >= known.entries)
