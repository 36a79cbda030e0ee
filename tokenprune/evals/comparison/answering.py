"""The rows of a comparison of vision-language models: what is named and found, and the time of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from tokenprune.evals.arms import Budget
from tokenprune.evals.comparison.measuring import measured_once, measured_path
from tokenprune.evals.lvlm_arms import REINDEX
from tokenprune.evals.lvlm_eval import TIMED_BATCH, evaluate_lvlm
from tokenprune.evals.table import Row, Table


def answer_budgets(
    model: nn.Module,
    name: str,
    methods: Sequence[str] | None,
    budgets: Sequence[Budget],
    folder: Path,
    *,
    samples: int,
    batch_size: int,
    rounds: int,
    seed: int,
    show_progress: bool,
) -> Iterator[Table]:
    """For each budget in turn its table, the unpatched row first; `speedup` is that of the prompt, from pixels to the
    last token's logits. What is in `folder` already is read and not measured again."""

    def measure(budget: Budget) -> Table:
        table = evaluate_lvlm(
            model,
            methods,
            [budget],
            samples=samples,
            batch_size=batch_size,
            rounds=rounds,
            seed=seed,
            show_progress=show_progress,
        )
        told: Row = {"model": name, "images": samples, "data": "pictures of digits", "batch": TIMED_BATCH}
        return Table([_row(row) for row in table.rows], {**told, **table.environment})

    for budget in budgets:
        yield measured_once(measured_path(folder, name, budget), partial(measure, budget))


def _row(row: Row) -> Row:
    """One row of `evaluate_lvlm` with the names of columns that all comparisons have."""
    positions = row.get("positions")
    named = {key.replace("prefill_speedup", "speedup"): cell for key, cell in row.items() if key != "positions"}
    if positions == REINDEX:
        named["method"] = f"{row['method']}, positions counted anew"
    if "speedup" not in named and named["flops_ratio"] == 1.0:
        named["speedup"] = 1.0
    return {**named, "note": named.pop("note")}
