"""What a thread is in the middle of: a forward from hook to hook. Nothing of it lives in a module."""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenprune.lvlm.cache import CacheMap
from tokenprune.lvlm.costs import Given
from tokenprune.lvlm.funnel import repad
from tokenprune.of_thread import OfThread

if TYPE_CHECKING:
    from tokenprune.lvlm.encoded import Encoded
    from tokenprune.lvlm.inside import Inside
    from tokenprune.lvlm.patch import LvlmPatch
    from tokenprune.lvlm.prefill import Prefill
    from tokenprune.lvlm.prompt import Prompt


@dataclass(eq=False)
class Call:
    """One forward, from the hook in front of `model` to the one behind the language model. visual: the placeholders
    {modality: bool [B, L]}, None where the forward brings no image. past: of the cache, None for one with every token.
    entries: of the cache. padding: [B, tokens] False for padding, None where no mask says. prompt, valid, map, moved:
    what the hook in front of the language model made of it, and whether any token stands elsewhere for it.
    """

    visual: Mapping[str, Tensor] | None
    past: CacheMap | None
    entries: int
    padding: Tensor | None
    prompt: Prompt | None = None
    valid: Tensor | None = None
    map: CacheMap | None = None
    moved: bool = False


@dataclass(eq=False)
class Local:
    """What this thread is in the middle of. candidates: tokens at the end of a prompt's forward that are none of the
    prompt, but guesses at its continuation."""

    call: Call | None = None
    labels: Tensor | None = None
    candidates: int = 0
    inside: Inside | None = None
    encoded: list[Encoded] = field(default_factory=list)
    latest: Encoded | None = None
    prompts: list[Prefill] = field(default_factory=list)
    given: Given = field(default_factory=lambda: Given((), {}))
    bound: dict[str, Any] = field(default_factory=dict)
    caught: dict[int, dict[str, Any]] = field(default_factory=dict)
    scores: list[Tensor] | None = None


_THREAD: OfThread[MutableMapping[LvlmPatch, Local]] = OfThread(WeakKeyDictionary)


def local_of(patch: LvlmPatch) -> Local:
    """This thread's part of a patch."""
    return _THREAD.value.setdefault(patch, Local())


def arguments_around(model: nn.Module) -> Mapping[str, Any]:
    """What the module around `model` is being called with, by name; nothing where none is.

    A module does not know what it is part of, and hooks on it do not see the arguments of that: the stack does.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        holder = frame.f_locals.get("self")
        if isinstance(holder, nn.Module) and any(part is model for part in holder.children()):
            return frame.f_locals
    return {}


def bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def shape_of(bound: Mapping[str, Any]) -> tuple[int, int]:
    """(samples, tokens) of a call."""
    tokens = bound["inputs_embeds"] if bound.get("inputs_embeds") is not None else bound["input_ids"]
    return int(tokens.shape[0]), int(tokens.shape[1])


def mask_of_entries(mask: Any, past: CacheMap, entries: int, batch: int) -> Any:
    """A mask of text behind a pruned prompt, for the entries of the cache."""
    if mask is None and past.padded:
        return torch.cat([past.valid, past.valid.new_ones(batch, entries - past.entries)], 1).long()
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return past.mask(mask)
    if isinstance(mask, Tensor) and mask.ndim == 4 and past.padded:
        return repad(mask, past.valid)
    return mask
