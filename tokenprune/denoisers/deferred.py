"""Masking in training: behind a denoiser's first blocks some patches are dropped, and the loss is over the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.denoisers.host import Arguments, DenoiserHost
from tokenprune.denoisers.patch import DenoiserPatch, Describe
from tokenprune.denoisers.records import grid_of
from tokenprune.denoisers.run import Pass, fresh, last_run, start
from tokenprune.denoisers.site import BlockSite
from tokenprune.errors import TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import Request
from tokenprune.kept_patches import KeptPatches
from tokenprune.method import Method
from tokenprune.recording import Forward
from tokenprune.state import in_backward


class DeferredSite(BlockSite):
    """Every block of a stack computes the kept tokens alone, those of one forward the same in all stacks."""

    def _pruned(self, module: nn.Module, forward: Callable[..., Any], bound: Arguments, one: Pass, keep: int) -> Any:
        x: Tensor = bound[self.hidden]
        if self.stack not in one.sets:
            earlier = next((chosen for chosen in one.sets.values() if chosen.tokens == x.shape[1]), None)
            if earlier is None:
                self._choose(one, keep, x, bound, None, None)
            else:
                one.sets[self.stack] = one.run.sets[self.stack] = earlier
        chosen = one.blocks[self.name] = one.sets[self.stack]
        self._note(one, self.stack, chosen.reduction, x)
        return self._on_chosen(forward, bound, chosen)


class DeferredPatch(DenoiserPatch):
    """See `DenoiserPatch`; it acts where the denoiser is in training mode."""

    def __init__(self, describe: Describe, host: DenoiserHost, adapter: str, method: Method, request: Request) -> None:
        if request.steps is not None:
            raise UnsupportedMethod(
                f"steps= is for denoising runs, and {method.name} acts in training forwards, which are of any step"
            )
        super().__init__(describe, host, adapter, method, request)
        self.site = DeferredSite
        if self.active:
            self.notes.append(
                "acts in training forwards alone, whose multiply-adds these are; in eval mode every token is there"
            )
            if self.shared:
                self.notes.append("all images of a batch lose the same patches: their rotary table is one for all")

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        """Hook: a forward of the whole model starts."""
        if self.probe is not None:
            return super().begin(model, args, kwargs)
        if not (self.active and model.training):
            return None
        if in_backward():
            raise UnsupportedModel(
                "gradient checkpointing runs the whole denoiser once more, and would draw other patches; checkpoint its"
                " blocks instead (enable_gradient_checkpointing)"
            )
        bound = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        latents: Tensor = bound[self.latents]
        grid = (latents.shape[-2], latents.shape[-1]) if latents.ndim == 4 else None
        forward = Forward(grid) if self.recordings else None
        for recording in self.recordings:
            recording.forwards.append(forward)  # type: ignore[arg-type]
        self.caches.refuse(model, anew=True)
        keep = self.plan(model, bound, (0.0,)).keep(0.0)
        start(Pass(self, fresh(self.key, latents), keep, grid, False, torch.tensor(0), forward=forward))
        return None

    def kept(self, model: nn.Module) -> KeptPatches | None:
        """What the last training forward of this thread kept, None where all is whole."""
        if not (self.active and model.training):
            return None
        run = last_run(self.key)
        if run is None or not run.sets:
            raise TokenPruneError(
                "no training forward of this model has been run in this thread; call it first, then kept_patches"
            )
        chosen = next(iter(run.sets.values()))
        grid = (run.shape[-2], run.shape[-1]) if len(run.shape) == 4 else None
        return KeptPatches(chosen.index, chosen.tokens, grid_of(grid, chosen.tokens))
