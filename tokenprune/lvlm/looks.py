"""The hooks on the layers of an image tower whose attention is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.lvlm.host import Scored, TowerCall
from tokenprune.lvlm.recipe import AfterTower

if TYPE_CHECKING:
    from tokenprune.lvlm.patch import LvlmPatch


def hook_layers(patch: LvlmPatch, tower: nn.Module, scored: Sequence[Scored]) -> list[Tap]:
    """Hook layers in the order in which they run; the taps on their parts. What is caught of the last is looked at when
    the tower has ended."""
    names = {id(module): name for name, module in tower.named_modules()}
    taps = [Tap(patch, layer.index, kind, names[id(module)]) for layer in scored for kind, module in layer.taps]
    for tap in taps:
        tap.follow(tower)
    for layer in scored[:-1]:
        layer.layer.register_forward_hook(_Look(patch, layer).leave)
    return taps


def scores_of(after: AfterTower, records: Sequence[AttentionRecord]) -> Tensor:
    """[patches, 1] of all images of a call."""
    assert after.score is not None
    return torch.cat([after.score(record).reshape(-1, 1).float() for record in records])


class Tap:
    """A hook that keeps what a module of a layer put out, or was given. path: of the module in the tower."""

    def __init__(self, patch: LvlmPatch, index: int, kind: str, path: str) -> None:
        self.patch = patch
        self.index = index
        self.kind = kind
        self.path = path

    def follow(self, tower: nn.Module) -> None:
        """Put the hook on what stands at the path: adapters may have been added or merged since."""
        module = tower.get_submodule(self.path)
        if self.kind.endswith("_inputs"):
            if self.inputs not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(self.inputs, with_kwargs=True)
        elif self.output not in module._forward_hooks.values():
            module.register_forward_hook(self.output)

    def output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._keep(output)

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(kwargs)

    def _keep(self, value: Any) -> None:
        self.patch.local.caught.setdefault(self.index, {})[self.kind] = value


class _Look:
    """A hook behind a layer before the last that is scored: scores it at once, so that what was caught may go."""

    def __init__(self, patch: LvlmPatch, scored: Scored) -> None:
        self.patch = patch
        self.records, self.index = scored.records, scored.index

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        local, after = self.patch.local, self.patch.after
        caught = local.caught.pop(self.index, {})
        if local.scores is None or after is None:  # run anew in a backward pass
            return
        call = TowerCall(local.bound, None, {**caught, "hidden": output})

        def look() -> Tensor:
            return scores_of(after, self.records(call))

        with torch.no_grad():
            local.scores.append(self.patch.spent.choosing(("score", local.given.shapes, self.index), look))
