"""``python -m tokenprune.evals.equal_latency MODEL SCHEDULE...`` sets schedules that were searched for beside the
method's own at equal measured time.

The method's own is timed at several budgets; a searched one is compared with the fastest of them that is no faster, on
the same images, of sources that neither training nor search has seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.data import ImageData
from tokenprune.evals.fidelity import agreement, correct
from tokenprune.evals.models import load_model
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.stats import Interval, bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import measure, measure_together
from tokenprune.stored_schedule import StoredSchedule, load_schedule

STEP = 0.02
STEPS = range(-2, 7)
UNPATCHED = "unpatched"


@dataclass(frozen=True)
class _Answers:
    """Of one arm, [N] each: whether the class is the label, and whether it is the unpatched model's."""

    right: Tensor
    same: Tensor


def against_own(
    model: nn.Module,
    data: ImageData,
    schedules: Mapping[str, StoredSchedule],
    *,
    timed: Tensor,
    rounds: int = 24,
    batch_size: int = 50,
) -> Table:
    """A row for the unpatched model, one for each of `schedules`, which are of one method, and one for each budget of
    the method's own schedule that one of them is compared with.

    timed: [B, C, H, W] the batch that is timed. Columns: `flops`; `speedup` over the unpatched model; `top1` and
    `agreement` with it over `data`; and of a searched schedule `beside`, the own one that it is compared with, `faster`
    (the time of that one over its time, measured again, with `control`), and `top1_gain`, `agreement_gain` (paired).

    Raises:
        TokenPruneError: schedules of several methods, or one that is slower than the method's own at every budget.
    """
    methods = {(found.method, repr(sorted(found.options.items()))) for found in schedules.values()}
    if len(methods) != 1:
        raise TokenPruneError(f"schedules of {len(methods)} methods or options cannot be set beside one own schedule")
    arms = {UNPATCHED: shared_copy(model)}
    arms |= {name: tokenprune.patch(shared_copy(model), schedule=found) for name, found in schedules.items()}
    own = _own(model, next(iter(schedules.values())), [_flops(arms[name]) for name in schedules])
    arms |= own
    runs = [partial(_run, arm, timed) for arm in (*arms.values(), shared_copy(model))]
    timings = dict(zip(arms, measure_together(runs, rounds, device=timed.device), strict=False))
    speedups = {name: timings[name].speedup for name in own}
    beside = {name: _as_fast(timings[name].speedup, speedups, name) for name in schedules}
    arms = {name: arm for name, arm in arms.items() if name not in own or name in beside.values()}
    compared = {name: _compared(arms[name], arms[other], timed, rounds) for name, other in beside.items()}
    answers = _answers(arms, data, timed, batch_size)
    rows = []
    for name, arm in arms.items():
        row: Row = {"schedule": name, "flops": 1.0 if name == UNPATCHED else _flops(arm), **timings[name].cells()}
        row |= interval_cells("top1", bootstrap_mean(answers[name].right, support=(0.0, 1.0)))
        row |= interval_cells("agreement", bootstrap_mean(answers[name].same, support=(0.0, 1.0)))
        if name in schedules:
            row |= {"beside": beside[name], **compared[name], **_gains(answers[name], answers[beside[name]])}
        rows.append(row)
    return Table(rows, {"data": data.name, "images": data.size, "batch": len(timed), **environment(timed.device)})


def _own(model: nn.Module, found: StoredSchedule, flops: Sequence[float]) -> dict[str, nn.Module]:
    """The method's own schedule at budgets around `flops`, in steps of STEP."""
    middle = {round(value / STEP) for value in flops}
    budgets = (STEP * step for step in range(min(middle) + STEPS.start, max(middle) + STEPS.stop))
    return {
        f"flops={budget:.2f}": tokenprune.patch(shared_copy(model), found.method, flops=budget, **found.options)
        for budget in budgets
        if 0.0 < budget < 1.0
    }


def _as_fast(speedup: Interval, own: Mapping[str, Interval], name: str) -> str:
    """The fastest of `own` that is no faster than `speedup`."""
    slower = {other: one.estimate for other, one in own.items() if one.estimate <= speedup.estimate}
    if not slower:
        raise TokenPruneError(f"{name} is slower than the method's own schedule at {', '.join(own)}")
    return max(slower, key=slower.__getitem__)


def _compared(found: nn.Module, own: nn.Module, timed: Tensor, rounds: int) -> Row:
    arms = (partial(_run, arm, timed) for arm in (own, found, shared_copy(own)))
    timing = measure(*arms, rounds=rounds, device=timed.device)
    return {**interval_cells("faster", timing.speedup), "control": timing.control, "trusted": timing.trusted}


def _gains(found: _Answers, own: _Answers) -> Row:
    right = bootstrap_mean(found.right.double() - own.right.double(), support=(-1.0, 1.0))
    same = bootstrap_mean(found.same.double() - own.same.double(), support=(-1.0, 1.0))
    return {**interval_cells("top1_gain", right), **interval_cells("agreement_gain", same)}


def _answers(arms: Mapping[str, nn.Module], data: ImageData, like: Tensor, batch_size: int) -> dict[str, _Answers]:
    right: dict[str, list[Tensor]] = {name: [] for name in arms}
    same: dict[str, list[Tensor]] = {name: [] for name in arms}
    for images, labels in data.batches(batch_size):
        if labels is None:
            raise TokenPruneError(f"{data.name} has no labels")
        with torch.inference_mode():
            logits = {name: arm(images.to(like)).cpu() for name, arm in arms.items()}
        for name, own in logits.items():
            right[name].append(correct(own, labels))
            same[name].append(agreement(own, logits[UNPATCHED]))
    return {name: _Answers(torch.cat(right[name]), torch.cat(same[name])) for name in arms}


def _flops(model: nn.Module) -> float:
    return float(tokenprune.report(model).to_dict()["flops_ratio"])


def _run(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


def main(arguments: list[str] | None = None) -> None:
    """The command; ``arguments`` replaces the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenprune.evals.equal_latency",
        description="Set searched schedules beside the method's own at equal measured time.",
        epilog="example: python -m tokenprune.evals.equal_latency digits-swin digits-swin-sparsevit-0.65",
    )
    parser.add_argument("model", help="one that comes with labelled images: digits-swin, digits-vit")
    parser.add_argument("schedules", nargs="+", metavar="SCHEDULE", help="files, or names of shipped ones")
    parser.add_argument("--images", type=int, default=2000, help="to classify (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of these (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of the batch that is timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    if loaded.data is None:
        parser.error(f"{options.model} comes without images")
    data = loaded.data(options.images, options.seed)
    timed, _ = next(data.batches(options.batch_size))
    found = {name: load_schedule(name) for name in options.schedules}
    print(against_own(loaded.model, data, found, timed=timed).to_markdown())


if __name__ == "__main__":
    main()
