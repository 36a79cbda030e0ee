"""What the adapters of timm's models of windows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModel, unknown_module
from tokenprune.family import Request
from tokenprune.method import Method
from tokenprune.narrow import patch as narrow
from tokenprune.narrow.host import NarrowHost
from tokenprune.narrow.patch import NarrowPatch
from tokenprune.narrow.prepare import prepare as prepare_narrow
from tokenprune.windows.host import WindowsHost
from tokenprune.windows.patch import WindowsPatch, attach
from tokenprune.windows.prepare import chooses_windows, prepare


class Windowed:
    """A family (`tokenprune.family.Family`) of timm's `models`, from the facts that `describe` says of one."""

    name: str
    models: ClassVar[tuple[type[nn.Module], ...]]

    @staticmethod
    def describe(model: nn.Module) -> WindowsHost:
        """The facts of a model.

        Raises:
            UnsupportedModel: a block in it is not known.
        """
        raise NotImplementedError

    @staticmethod
    def describe_tokens(model: nn.Module) -> NarrowHost:
        """The facts of a model for methods that choose tokens within windows.

        Raises:
            UnsupportedModel: a block in it is not known.
            UnsupportedMethod: there is no such method for this family.
        """
        raise NotImplementedError

    def find(self, target: object) -> nn.Module | None:
        """The model of this family that is `target` or inside it, or None."""
        assert isinstance(target, nn.Module)
        found = [module for module in target.modules() if isinstance(module, self.models)]
        if len(found) > 1:
            kind = type(found[0]).__name__
            raise UnsupportedModel(f"{type(target).__name__} holds {len(found)} of {kind}; patch each by itself")
        return found[0] if found else None

    def prepare(self, model: nn.Module, method: Method, request: Request) -> WindowsPatch | NarrowPatch:
        """The patch, its budget solved at the model's usual input; nothing is attached yet."""
        if chooses_windows(method):
            return prepare(self.describe, model, self.name, method, request)
        return prepare_narrow(self.describe_tokens, model, self.name, method, request)

    def attach(self, model: nn.Module, patch: WindowsPatch | NarrowPatch) -> None:
        """Put a prepared patch on the model."""
        if isinstance(patch, NarrowPatch):
            narrow.attach(self.describe_tokens(model), patch)
        else:
            attach(self.describe(model), patch)


def swapped_for(block: nn.Module, known: Mapping[type[nn.Module], type[nn.Module]]) -> type[nn.Module]:
    """The class that stands in for that of a block, patched or not.

    Raises:
        UnsupportedModel: it is none of the known ones.
    """
    original = getattr(type(block), "_tokenprune_original", type(block))
    if original not in known:
        raise unknown_module(block)
    return known[original]


def example_of(model: nn.Module, size: Sequence[int]) -> Callable[[int], Tensor]:
    """Batch -> an input of that size, with the model's device and dtype."""
    return partial(_example, model, size)


def _example(model: Any, size: Sequence[int], batch: int) -> Tensor:
    weight = next(p for p in model.parameters() if p.is_floating_point())
    channels = model.patch_embed.proj.in_channels
    return torch.empty(batch, channels, *size, device=weight.device, dtype=weight.dtype)
