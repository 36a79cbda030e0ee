"""Work: the steps of a training, and what of them a state holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import MALFORMED, TokenPruneError
from tokenprune.evals.data import ImageData
from tokenprune.learned_parts import LearnedParts, safetensors, write_whole
from tokenprune.learning import Recipe
from tokenprune.training.resuming import check_state, remembered
from tokenprune.training.state import MODEL, generators, read_state, set_generators, write_state
from tokenprune.training.taught import Taught
from tokenprune.training.tuning import Tuned, write_record

SCHEDULERS = ("cosine", "tanh", "step", "multistep", "poly")
"""Those of timm that follow the number of steps alone."""

_MODEL = "the model's own weights"


class Work:
    """model: that whose own weights are trained too, None where they stay. step: how many of `steps` are done. history:
    of each what its loss consists of, means over all processes. saved: the step of the last state, if any. identity: of
    the data, and of the weights that the model began with, None where they are not known."""

    def __init__(
        self,
        taught: Taught | Tuned,
        accelerator: Any,
        start: LearnedParts,
        recipe: Mapping[str, Any],
        *,
        paper: Recipe,
        steps: int,
        per_epoch: int,
        identity: dict[str, Any] | None = None,
    ) -> None:
        from timm.optim import create_optimizer_v2, list_optimizers
        from timm.scheduler import create_scheduler_v2

        self.learned = taught.parts if isinstance(taught, Taught) else nn.ModuleDict()
        self.declared = taught.patch.method.learned if isinstance(taught, Taught) else None
        self.accelerator, self.start, self.recipe, self.steps = accelerator, start, recipe, steps
        self.step, self.saved, self.history = 0, 0, list[list[float]]()
        self.identity = {} if identity is None else identity
        if recipe["sched"] not in SCHEDULERS:
            raise TokenPruneError(
                f"sched={recipe['sched']!r}: one that follows the steps alone, {', '.join(SCHEDULERS)}"
            )
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self.learned.named_parameters():
            groups.setdefault(name.split(".", 1)[1], []).append(parameter)
        rates: dict[str, float] = {}
        if self.declared is not None:
            rates = {name: recipe["learning_rate"] * self.declared.rate(name, steps) for name in groups}
        self.model = taught.model if recipe["model_rate"] else None
        if self.model is not None:
            groups[_MODEL] = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            rates[_MODEL] = recipe["learning_rate"] * recipe["model_rate"]
        if recipe["opt"] not in list_optimizers():
            raise TokenPruneError(f"opt={recipe['opt']!r} is none of timm's: {', '.join(list_optimizers())}")
        optimizer = create_optimizer_v2(
            [{"params": group, "lr": rates[name]} for name, group in groups.items()],
            opt=recipe["opt"],
            lr=max(rates.values()),
            momentum=paper.momentum,
            weight_decay=paper.weight_decay,
        )
        self.scheduler, _ = create_scheduler_v2(
            optimizer, recipe["sched"], recipe["epochs"], step_on_epochs=False, updates_per_epoch=per_epoch
        )
        self.inner = taught
        self.taught, self.optimizer = accelerator.prepare(taught, optimizer)

    def run(
        self,
        taken: Iterator[tuple[Tensor, Tensor]],
        state: Path | None,
        *,
        accumulate: int,
        save_every: int,
        show: bool,
    ) -> None:
        """The steps that are left, on the batches `taken`; writes what is learned and the state beside it."""
        with (
            remembered(self.model, state),
            _bar(self.steps, self.step, show=show and self.accelerator.is_main_process) as bar,
        ):
            while self.step < self.steps:
                self.scheduler.step_update(self.step)
                self.inner.progress = self.step / self.steps
                seen = self._gradients(taken, accumulate)
                if not all(map(math.isfinite, seen)):
                    raise TokenPruneError(self._not_finite(seen, state))
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.declared is not None and self.declared.settle is not None:
                    for part in self.learned.values():
                        self.declared.settle(part)
                self.step += 1
                self.history.append(seen)
                bar.update(1)
                bar.set_postfix({name: f"{one:.4f}" for name, one in zip(self.inner.told, seen, strict=True)})
                if state is not None and (self.step == self.steps or self.step % save_every == 0):
                    self.save(state)

    def _gradients(self, taken: Iterator[tuple[Tensor, Tensor]], accumulate: int) -> list[float]:
        total = torch.zeros(len(self.inner.told), device=self.accelerator.device)
        for turn in range(accumulate):
            images, labels = (x.to(self.accelerator.device, non_blocking=True) for x in next(taken))
            last = turn == accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.taught):
                loss, seen = self.taught(images, labels)
                self.accelerator.backward(loss)  # divided by how many are accumulated
            total += seen / accumulate
        means: list[float] = self.accelerator.reduce(total, "mean").tolist()
        return means

    def _not_finite(self, seen: list[float], state: Path | None) -> str:
        kept = f"{state} is that of step {self.saved}" if self.saved else "no state had been written"
        added = f" and {seen[1]:g} that the method adds" if len(seen) > 1 else ""
        return (
            f"the loss of step {self.step + 1} is {seen[0]:g} for the task{added}, and the training stops; {kept}."
            " Look for NaN among the images and in the model's output; a smaller learning_rate or"
            " mixed_precision='no' may help"
        )

    def parts(self) -> LearnedParts:
        """What is learned so far."""
        strip = None if self.declared is None else self.declared.strip
        states = {place: part.state_dict() if strip is None else strip(part) for place, part in self.learned.items()}
        tensors = {
            f"{place}.{name}": tensor.detach().cpu().clone()
            for place, state in states.items()
            for name, tensor in state.items()
        }
        names = ["flops"] if self.declared is not None else []
        names += ["data", "images", "epochs", "batch_size", "processes", "accumulate", "learning_rate", "seed"]
        names += ["labels"] if self.recipe["labels"] == "maps" else []
        names += [name for name in ("distill_logits", "distill_tokens", "model_rate") if self.recipe[name]]
        found = {name: self.recipe[name] for name in names} | {"steps": self.step}
        if self.history:
            found |= dict(zip(self.inner.told, self.history[-1], strict=True))
        return replace(self.start, tensors=tensors, found=found)

    def save(self, path: Path) -> None:
        """Write the state to `path`, and what is learned beside it, with the model's weights where they are trained."""
        states = [self.accelerator.gather(one.to(self.accelerator.device)[None]).cpu() for one in generators()]
        if self.accelerator.is_main_process:
            if self.declared is not None:
                self.parts().save(path.parent)
            else:
                write_record(path.parent, self.parts())
            own = None if self.model is None else {name: x.cpu().clone() for name, x in self.model.state_dict().items()}
            if own is not None:
                write_whole(path.parent / MODEL, safetensors().torch.save(own))
            scaler = self.accelerator.scaler
            state = {
                "learned": self.learned.state_dict(),
                "model": own,
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "generators": states,
                "step": self.step,
                "norms": list(self.start.norms),
                "identity": self.identity,
                "history": torch.tensor(self.history, dtype=torch.float64),
            }
            write_state(path, state, self.recipe)
        self.saved = self.step
        self.accelerator.wait_for_everyone()

    def resume(self, path: Path, data: ImageData, workers: int = 0) -> None:
        """The inverse of `save`, where there is a state at `path`. data: what the training reads. workers: by how many.

        Raises:
            TokenPruneError: it cannot be read, is of other images, labels or weights, or is not there for all
                processes.
        """
        if path.exists():
            self._resume(path, data, workers)
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise TokenPruneError(
                f"the state in {path.parent} is that of step {', '.join(map(str, steps))} for one process and another:"
                " name an output= folder that all machines share"
            )

    def _resume(self, path: Path, data: ImageData, workers: int) -> None:
        state = read_state(path, self.recipe)
        try:
            self.identity = check_state(self, path, state, data, workers)
            self.learned.load_state_dict(state["learned"])
            if self.model is not None:
                self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            set_generators([states[self.accelerator.process_index] for states in state["generators"]])
            self.step = self.saved = state["step"]
            self.history = state["history"].tolist()
        except TokenPruneError:
            raise
        except (*MALFORMED, IndexError, RuntimeError) as error:
            raise TokenPruneError(
                f"{path} is no state that tokenprune train has written for this model: {error!r}; name an --output of"
                " its own"
            ) from error


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: int) -> None:
        """Nothing to show."""

    def set_postfix(self, _: Mapping[str, str]) -> None:
        """Nothing to show."""


def _bar(total: int, done: int, *, show: bool) -> Any:
    """A bar on standard error, where it is a terminal, `show` is True and tqdm is installed."""
    if not show or find_spec("tqdm") is None:
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="train", dynamic_ncols=True, disable=None)
