"""Where the time of an answer goes in a vision-language model of LLaVA-1.5's proportions, whole and pruned.

    python -m tokenprune.evals.lvlm_speed

576 visual tokens of a CLIP-L/14 tower at 336 pixels and 50 of text, in a LLaMA of a width and depth that a processor
runs in a second. The weights are random; they decide which tokens go and not how long that takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune.evals.random_llava import generate, llava, prompt
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.side_by_side import CONTROL, SideBySide, turns
from tokenprune.evals.stats import bootstrap_median
from tokenprune.evals.stopwatch import Stopwatch
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import peak_memory, waiting_clock
from tokenprune.flop_count import MathAttention

UNPATCHED = "unpatched"
PARTS = ("first_token", "tower", "prefill", "between", "behind", "decode")
BEHIND_THE_TOWER = ("fopru", "top_k", "visionzip", "prumerge", "divprune", "cdpruner", "zero_tprune")
METHODS = (*BEHIND_THE_TOWER, "feather", "fastv", "pyramid_drop")


class Laps:
    """Reads a clock where a model enters and leaves its parts, and behind each token of an answer."""

    def __init__(self, model: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.tower, self.text = Stopwatch(clock), Stopwatch(clock)
        for module in (model.model.vision_tower, model.model.multi_modal_projector):
            self.tower.watch(module, inside=True)
        for module in (model.model.language_model, model.lm_head):
            self.text.watch(module, inside=True)
        self.tokens: list[tuple[float, float, float]] = []
        model.register_forward_hook(self._token)

    def _token(self, model: nn.Module, args: Any, output: Any) -> None:
        self.tokens.append((self.clock(), self.tower(), self.text()))

    def of(self, answer: Callable[[], object]) -> dict[str, float]:
        """What an answer spends until its `first_token`: in the `tower` (with the projector), in the language model on
        the prompt (`prefill`), outside of both (`between`), and outside of the tower alone (`behind`); then for each
        token more (`decode`)."""
        start, tower, text = self.clock(), self.tower(), self.text()
        self.tokens = []
        answer()
        first, last = self.tokens[0], self.tokens[-1]
        whole, tower, text = first[0] - start, first[1] - tower, first[2] - text
        found = {"first_token": whole, "tower": tower, "prefill": text}
        found |= {"between": whole - tower - text, "behind": whole - tower}
        return found | {"decode": (last[0] - first[0]) / max(1, len(self.tokens) - 1)}


def cache_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Bytes of the keys and values that a prompt leaves in the cache."""
    cache = generate(model, inputs, 1).past_key_values
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)


def counted_bytes(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """The same by the tokens that go into each layer, as the recording of a patched model tells them."""
    text, depth = model.config.text_config, model.config.text_config.num_hidden_layers
    is_visual = inputs["input_ids"] == model.config.image_token_index
    with tokenprune.record(model) as recorded:
        generate(model, inputs, 1)
    visual = [int(is_visual.sum())] * depth
    for place in recorded.forwards[0].places:
        first = int(place.name.removeprefix("layers.")) if place.name.startswith("layers.") else 0
        visual[first:] = [place.kept.shape[1]] * (depth - first)
    tokens: int = sum(visual) + depth * int((~is_visual).sum())
    of_one: int = 2 * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    return tokens * of_one


def multiply_adds_behind(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Of all that comes behind the tower, until the first token."""
    copy = shared_copy(model)
    with FlopCounterMode(display=False) as counter, MathAttention():
        return Laps(copy, counter.get_total_flops).of(partial(generate, copy, inputs, 1))["behind"] / 2


def speed_table(
    model: nn.Module,
    methods: Sequence[str] = METHODS,
    *,
    tokens: int = 64,
    text: int = 50,
    answer: int = 3,
    rounds: int = 20,
    attempts: int = 2,
) -> Table:
    """A row for the unpatched model and for each of `methods`, which leave `tokens` visual tokens of an image behind
    the tower or behind their last layer; `text` tokens of text stand around the image.

    Milliseconds, medians: `tower` (with the projector), `scoring` (what the patch adds outside of tower and language
    model), `prefill` (of the language model), `first_token` (from the call on), `decode` (for each of the `answer` - 1
    tokens behind it). Over the unpatched model's, medians of the rounds' ratios with 95% intervals: `speedup` of all
    but the tower, prefill and scoring; `promised`, that of their multiply-adds, and `kept_promise`, the one over the
    other; `first_token_speedup`, `decode_speedup`; `of_tower`, scoring over the tower's time. `cache_mb` is the
    prompt's cache, `as_counted` whether its bytes are exactly those of the tokens in each layer, `peak_mb` the memory
    of a whole answer where CUDA measures it. On CUDA the clock waits for the device wherever it is read. Below the
    table stands `control`, the unpatched model's first token against itself.
    """
    inputs = prompt(model, text)
    device, dtype = inputs["pixel_values"].device, inputs["pixel_values"].dtype
    patched = {name: tokenprune.patch(shared_copy(model), name, tokens=tokens) for name in methods}
    models: dict[str, nn.Module] = {UNPATCHED: shared_copy(model), CONTROL: shared_copy(model), **patched}
    answers = {name: partial(generate, one, inputs, answer) for name, one in models.items()}
    for run in answers.values():
        run()
    # Prefill and decode are told apart only where each has ended before the next is begun.
    laps = {name: Laps(one, waiting_clock(device)) for name, one in models.items()}
    parts: dict[str, SideBySide] = {}
    for _ in range(max(1, attempts)):
        parts = {part: SideBySide(UNPATCHED, {name: [] for name in models}) for part in PARTS}
        for order in turns(list(models), rounds):
            for name in order:
                for part, seconds in laps[name].of(answers[name]).items():
                    parts[part].seconds[name].append(seconds)
        if parts["first_token"].trusted:
            break
    whole = multiply_adds_behind(model, inputs)
    rows = [
        _times(UNPATCHED, parts) | {"cache_mb": cache_bytes(model, inputs) / 2**20} | _peak(answers[UNPATCHED], device)
    ]
    for name, one in patched.items():
        held, counted = cache_bytes(one, inputs), counted_bytes(one, inputs)
        row = _times(name, parts) | _ratios(name, parts, whole / multiply_adds_behind(one, inputs))
        row |= {"cache_mb": held / 2**20, "as_counted": held == counted}
        rows.append(row | _peak(answers[name], device))
    sizes = {"visual tokens": inputs["input_ids"].shape[1] - text, "text tokens": text}
    control = {"control": parts["first_token"].control, "trusted": parts["first_token"].trusted}
    return Table(rows, {**sizes, **control, **environment(device, dtype)})


def _peak(answer: Callable[[], object], device: torch.device) -> Row:
    peak = peak_memory(answer, device)
    return {"peak_mb": None if peak is None else peak / 2**20}


def _times(name: str, parts: Mapping[str, SideBySide]) -> Row:
    row: Row = {"method": name}
    for part in ("tower", "scoring", "prefill", "first_token", "decode"):
        row[part] = 1e3 * (statistics.median(_scoring(name, parts)) if part == "scoring" else parts[part].median(name))
    return row


def _ratios(name: str, parts: Mapping[str, SideBySide], promised: float) -> Row:
    row: Row = {}
    for column, part in {"speedup": "behind", "first_token_speedup": "first_token", "decode_speedup": "decode"}.items():
        found = parts[part].ratio(UNPATCHED, name)
        row |= interval_cells(column, found)
        if part == "behind":
            row |= {"promised": promised, "kept_promise": found.estimate / promised}
    towers = zip(_scoring(name, parts), parts["tower"].seconds[UNPATCHED], strict=True)
    share = bootstrap_median([scoring / tower for scoring, tower in towers])
    return row | interval_cells("of_tower", share)


def _scoring(name: str, parts: Mapping[str, SideBySide]) -> list[float]:
    """Seconds of each round that are spent outside of tower and language model, and not by the unpatched model."""
    between = parts["between"].seconds
    return [mine - other for mine, other in zip(between[name], between[UNPATCHED], strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.lvlm_speed", description=main.__doc__)
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable (default: all)")
    parser.add_argument("--tokens", type=int, default=64, help="visual tokens left (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of the language model (default: %(default)s)")
    parser.add_argument("--tower-layers", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="at least 20 (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=2, help="of a quiet measurement (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = llava(layers=options.layers, tower_layers=options.tower_layers)
    timed = {"tokens": options.tokens, "rounds": options.rounds, "attempts": options.attempts}
    print(speed_table(model, options.method or METHODS, **timed).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
