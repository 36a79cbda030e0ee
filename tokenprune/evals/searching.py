"""The state of a search for schedules, one candidate a step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.calibration import MET
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedModel
from tokenprune.evals.arms import refuse_training_only
from tokenprune.evals.candidates import Genes, crossed, drawn, mutated, picked
from tokenprune.evals.fidelity import Observation, agreement, observe
from tokenprune.evals.ranks import ALONE, Ranks
from tokenprune.evals.resumable import damaged, read_state, write_state
from tokenprune.evals.saliency import feature_cosine
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.spaces import space_of
from tokenprune.evals.throughput import measure, measure_together
from tokenprune.latency import device_name
from tokenprune.solver import Counts
from tokenprune.stored_schedule import StoredSchedule

T = TypeVar("T")

WARM_UP = 40
PARENTS = 10
TRIES = 50
ROUNDS = 5
VERIFIED = 5
NEARLY = 0.005
PART = 16
"""Images of a forward, which are shared out where there are several processes."""


@dataclass(frozen=True)
class Goal:
    """name: "flops", "speedup" or "min_agreement"; what it means in `tokenprune.search`."""

    name: str
    value: float

    @property
    def timed(self) -> bool:
        """Whether candidates are timed."""
        return self.name != "flops"


@dataclass(frozen=True)
class Candidate:
    """A schedule that was tried. closeness: cosine of the features. speedup: NaN where it was not timed."""

    genes: Genes
    counts: Counts
    agreement: float
    closeness: float
    flops_ratio: float
    speedup: float

    def rank(self, goal: Goal) -> tuple[float, ...]:
        """The greater the better; those that meet the goal first."""
        if goal.name == "flops":
            off = abs(self.flops_ratio - goal.value)
            return (1.0, self.agreement, self.closeness) if off <= MET else (0.0, -off)
        if goal.name == "speedup":
            met = self.speedup >= goal.value
            return (1.0, self.agreement, self.closeness) if met else (0.0, self.speedup)
        met = self.agreement >= goal.value
        return (1.0, self.speedup) if met else (0.0, self.agreement, self.closeness)

    def meets(self, goal: Goal) -> bool:
        """Whether it is what was asked for."""
        return self.rank(goal)[0] == 1.0


class Search:
    """A search, as the steps of `tokenprune.evals.resumable.run`. evolves: whether candidates are made of others, once
    there are enough."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        method: str,
        options: Mapping[str, Any],
        goal: Goal,
        *,
        evolves: bool,
        batch_size: int = 8,
        seed: int = 0,
        restore: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        processes: Ranks = ALONE,
    ) -> None:
        refuse_training_only(method)
        self.base = tokenprune.unpatch(shared_copy(model)).eval()
        self.images, self.method, self.options, self.goal = images, method, dict(options), goal
        self.restore, self.processes = restore, processes
        self.evolves, self.batch_size, self.seed, self.clock = evolves, batch_size, seed, clock
        self.generator = torch.Generator().manual_seed(seed)
        self.candidates: list[Candidate] = []
        self.step, self.log, self.seconds = 0, list[dict[str, float]](), 0.0
        self.space = space_of(self.base, method, self.options, restore)
        if goal.name == "flops" and goal.value > self.space.most + MET:
            raise BudgetError(
                f"flops={goal.value:g} is more than the {self.space.most:.3f} that remain without removing a token, as"
                " the last block runs on prefix tokens alone; use less"
            )
        self.reference: Observation | None = None  # of all images, on rank 0
        self._observed(self.base, self._refer)

    def advance(self) -> None:
        """Try one candidate more, or none where no further one is found."""
        start = time.process_time()
        following = self._next()
        if following is not None:
            self.candidates.append(self._tried(*following))
        self.step += 1
        best = self.best()
        shown = {"agreement": best.agreement, "cosine": best.closeness, "flops": best.flops_ratio}
        if self.goal.timed:
            shown["speedup"] = best.speedup
        self.log = [{"step": self.step, **shown}]
        self.seconds += time.process_time() - start

    def best(self) -> Candidate:
        """The best candidate so far."""
        return max(self.candidates, key=lambda one: one.rank(self.goal))

    def result(self) -> StoredSchedule:
        """The best candidate of all, timed by the full protocol where time is the goal.

        Raises:
            BudgetError: none meets the goal.
        """
        ranked = sorted(self.candidates, key=lambda one: one.rank(self.goal), reverse=True)
        met = [one for one in ranked if one.meets(self.goal)]
        if self.goal.timed:
            met = self.processes.from_main(partial(self._verified, met[:VERIFIED]))
        if not met:
            best = ranked[0]
            other = "less" if self.goal.timed else f"flops={best.flops_ratio:.3f}"
            speedup = f" speed-up {best.speedup:.2f}," if self.goal.timed else ""
            raise BudgetError(
                f"none of {len(ranked)} schedules of {self.method} reaches {self.goal.name}={self.goal.value:g}; the"
                f" nearest: agreement {best.agreement:.3f},{speedup} flops {best.flops_ratio:.3f}. Ask for {other}, or"
                " try more candidates"
            )
        best = met[0]
        found = {
            "goal": {self.goal.name: self.goal.value},
            "agreement": best.agreement,
            "cosine": best.closeness,
            "flops_ratio": best.flops_ratio,
            "images": len(self.images),
            "candidates": len(self.candidates),
            "seed": self.seed,
        }
        if self.goal.timed:
            found |= {"speedup": best.speedup, "batch_size": self.batch_size}
        return StoredSchedule(self.method, self.space.schedule(best.counts), self.options, found, self.restore)

    def save(self, path: Path) -> None:
        """Writes the state in one piece."""
        state = {
            "of": self._fingerprint(),
            "generator": self.generator.get_state(),
            "candidates": [asdict(one) for one in self.candidates],
            "step": self.step,
            "seconds": self.seconds,
        }
        write_state(state, path)

    def resume(self, path: Path) -> None:
        """The inverse of `save`.

        Raises:
            TokenPruneError: the state of another search.
        """
        state = self.processes.from_main(partial(read_state, path))
        if state.get("of") != self._fingerprint():
            raise TokenPruneError(
                f"{path} is of another search (model, images, method, goal, seed or, where it is timed, device or"
                " threads); name an --output of its own"
            )
        with damaged(path):
            self.generator.set_state(state["generator"])
            self.candidates = [Candidate(**one) for one in state["candidates"]]
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
        if self.candidates:
            self.log = [{"step": self.step, "agreement": self.best().agreement}]

    def _observed(self, model: nn.Module, make: Callable[[Observation], T]) -> T:
        """`make` of what the model gives on all images."""
        own = self.processes.own(torch.split(self.images, PART))
        with torch.inference_mode():
            seen = [observe(model, part) for part in own]
        for one in seen:
            if not isinstance(one.logits, Tensor):
                raise UnsupportedModel(f"search compares tensors; {type(self.base).__name__} gives {type(one.logits)}")

        def whole(parts: list[Observation]) -> T:
            return make(Observation(torch.cat([p.features for p in parts]), torch.cat([p.logits for p in parts])))

        return self.processes.joined([Observation(one.features.cpu(), one.logits.cpu()) for one in seen], whole)

    def _refer(self, seen: Observation) -> None:
        if not seen.features.isfinite().all():
            raise TokenPruneError("the unpatched model gives NaN or infinity on these images; nothing agrees with that")
        self.reference = seen

    def _agreed(self, seen: Observation) -> tuple[float, float]:
        """Share of the unpatched model's answers, or without classes that cosine, and cosine of the features."""
        assert self.reference is not None
        closeness = float(feature_cosine(seen.features, self.reference.features).mean())
        if getattr(self.base, "num_classes", None) == 0:
            return closeness, closeness
        return float(agreement(seen.logits, self.reference.logits).double().mean()), closeness

    def _next(self) -> tuple[Counts, float] | None:
        """Counts that were not tried yet, and the share of the multiply-adds at which they aim.

        Raises:
            BudgetError: the goal is out of reach.
        """
        known = {tuple(sorted(one.counts.items())) for one in self.candidates}
        for attempt in range(TRIES):
            aim = self._aim()
            try:
                first = not self.candidates and not attempt
                counts = self._own(aim) if first else self.space.solved(self._genes(), aim)
            except BudgetError:
                continue
            if tuple(sorted(counts.items())) not in known:
                return counts, aim
        if self.candidates:
            return None
        raise BudgetError(
            f"no schedule of {self.method} comes near {self.goal.name}={self.goal.value:g} on this model; ask for less"
        )

    def _aim(self) -> float:
        """The share of the multiply-adds at which the next candidate aims."""
        if self.goal.name == "flops":
            return min(self.goal.value, self.space.most - NEARLY)
        if self.goal.name == "speedup":
            dearer = sorted(1.0 / (one.speedup * one.flops_ratio) for one in self.candidates)
            return min(0.99, 1.0 / (self.goal.value * (dearer[len(dearer) // 2] if dearer else 1.0)))
        met = [one.flops_ratio for one in self.candidates if one.meets(self.goal)]
        high = min(met, default=0.98)
        low = 0.8 * high if met or not self.candidates else min(0.9, max(one.flops_ratio for one in self.candidates))
        return low + (high - low) * float(torch.rand(1, generator=self.generator))

    def _own(self, aim: float) -> Counts:
        """The method's own schedule."""
        return self.space.own(self._patched(flops=aim))

    def _genes(self) -> Genes:
        if not self.evolves or len(self.candidates) < WARM_UP:
            return drawn(self.space.depth, self.generator)
        ranked = sorted(self.candidates, key=lambda one: one.rank(self.goal), reverse=True)
        parents = [one.genes for one in ranked[:PARENTS]]
        first = picked(parents, self.generator)
        if float(torch.rand(1, generator=self.generator)) < 0.5:
            return mutated(first, self.generator)
        return crossed(first, picked(parents, self.generator), self.generator)

    def _tried(self, counts: Counts, aim: float) -> Candidate:
        genes = self.space.genes(counts)
        model, ratio = self._counted(counts)
        for asked in (2 * aim - ratio, aim):  # the cost of a schedule is a model; aim once more by what was counted
            if abs(ratio - aim) <= NEARLY:
                break
            try:
                again = self.space.solved(genes, asked)
            except BudgetError:
                continue
            other, counted = self._counted(again)
            if abs(counted - aim) < abs(ratio - aim):
                counts, model, ratio = again, other, counted
        same, closeness = self._observed(model, self._agreed)
        speedup = self.processes.from_main(partial(self._speedup, model)) if self.goal.timed else float("nan")
        return Candidate(genes, counts, same, closeness, ratio, speedup)

    def _patched(self, **budget: Any) -> nn.Module:
        return tokenprune.patch(shared_copy(self.base), self.method, **budget, restore=self.restore, **self.options)

    def _scheduled(self, counts: Counts) -> nn.Module:
        return self._patched(schedule=self.space.schedule(counts))

    def _counted(self, counts: Counts) -> tuple[nn.Module, float]:
        """The model so patched, and its share of the multiply-adds."""
        model = self._scheduled(counts)
        return model, tokenprune.report(model).to_dict()["flops_ratio"]

    def _speedup(self, model: nn.Module) -> float:
        arms = [partial(one, self.images[: self.batch_size]) for one in (self.base, model, self.base)]
        with torch.inference_mode():
            found = measure_together(arms, ROUNDS, device=self.images.device, clock=self.clock)
        return found[1].speedup.estimate

    def _verified(self, candidates: list[Candidate]) -> list[Candidate]:
        """`candidates` that meet the goal by the full protocol too: the best first."""
        timed = []
        batch = self.images[: self.batch_size]
        for one in candidates:
            arms = (partial(model, batch) for model in (self.base, self._scheduled(one.counts), self.base))
            with torch.inference_mode():
                timing = measure(*arms, device=batch.device, clock=self.clock)
            timed.append(replace(one, speedup=timing.speedup.estimate))
        timed = [one for one in timed if one.meets(self.goal)]
        return sorted(timed, key=lambda one: one.rank(self.goal), reverse=True)

    def _fingerprint(self) -> str:
        told: tuple[Any, ...] = (self.method, sorted(self.options.items()), self.restore, self.goal)
        told += (self.evolves, self.batch_size, self.seed)
        if self.goal.timed:
            told += (device_name(self.images.device), torch.get_num_threads())
        digest = hashlib.sha256(repr(told).encode())
        for tensor in (self.images, *self.base.state_dict().values()):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
