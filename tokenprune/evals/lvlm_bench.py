"""Prefill and decoding of a vision-language model, patched and unpatched interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals.lvlm_arms import LvlmArm
from tokenprune.evals.progress import progress
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, interval_cells
from tokenprune.evals.throughput import measure


def time_answers(
    arms: Sequence[LvlmArm],
    inputs: Mapping[str, Tensor],
    *,
    rounds: int = 20,
    attempts: int = 1,
    seed: int = 0,
    show_progress: bool = False,
) -> list[Row]:
    """The columns of timing of each arm against the first, the unpatched one, and a second unpatched one.

    inputs: arguments of a forward. `prefill_speedup`: of the whole prompt, from pixels to the last token's logits;
    `decode_speedup`: of one token more behind it, both medians of the rounds' ratios with 95% intervals. `trusted`:
    whether the unpatched model was within 2% of itself in both. No columns for the unpatched arm and one without model.
    """
    base = arms[0].model
    assert base is not None
    second, rows = shared_copy(base), list[Row]()
    for arm in progress(arms, "bench", show=show_progress):
        row: Row = {}
        if arm.is_patched and arm.model is not None:
            trusted = True
            for name, work in (("prefill", prefill), ("decode", decode)):
                a, b, control = (work(model, inputs) for model in (base, arm.model, second))
                timing = measure(a, b, control, rounds=rounds, attempts=attempts, seed=seed)
                row |= interval_cells(f"{name}_speedup", timing.speedup)
                trusted &= timing.trusted
            row["trusted"] = trusted
        rows.append(row)
    return rows


def prefill(model: Any, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """A call of it runs the prompt."""

    @torch.inference_mode()
    def run() -> object:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    return run


def decode(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """A call of it runs one token behind the prompt, the same one every time."""
    output: Any = prefill(model, inputs)()
    cache, mask = output.past_key_values, inputs["attention_mask"]
    following = {
        "input_ids": output.logits[:, -1:].argmax(-1),
        "attention_mask": torch.cat([mask, mask[:, :1]], 1),
        "position_ids": mask.sum(1, keepdim=True),
    }

    @torch.inference_mode()
    def run() -> object:
        output = model(**following, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        return output

    return run
