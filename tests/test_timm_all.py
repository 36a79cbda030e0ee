"""Every name of timm's plain-ViT modules, through the public contract only."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import zoo
from torch import Tensor, nn

import tokenprune

BUDGET = 0.6
REFUSED: dict[str, str] = {}  # name: why; at most 10
PINNED = Path(__file__).with_name("counts.json")

outcomes: dict[str, dict[str, str]] = {"shrunk": {}, "real size": {}}


@dataclass(frozen=True)
class Cost:
    """FLOPs of one unpatched forward, those outside the blocks, and those of one token in the costliest block."""

    total: int
    outside: int
    token: float


def cost(model: nn.Module, x: Tensor) -> Cost:
    tokens: list[int] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda block, args: tokens.append(args[0].shape[1]))
    counter = zoo.count(model, x)
    hook.remove()
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    blocks = [flops for name, flops in counts.items() if re.fullmatch(r"\w+\.blocks\.\d+", name)]
    assert len(blocks) == len(model.blocks)
    total = counter.get_total_flops()
    return Cost(total, total - sum(blocks), max(blocks) / tokens[0])


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that a patch could leave behind: the class and the very objects in the vars() of every module.

    A container is followed by its contents, so that a hook or a parameter added to it shows.
    """
    for name, module in model.named_modules():
        yield name, type(module)
        for key, value in vars(module).items():
            yield f"{name}.{key}", value
            if isinstance(value, dict):
                yield from ((f"{name}.{key}[{inner!r}]", item) for inner, item in value.items())
            elif isinstance(value, list | tuple | set):
                yield from ((f"{name}.{key}[{i}]", item) for i, item in enumerate(value))


def assert_same_state(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> None:
    assert [name for name, _ in before] == [name for name, _ in after]
    changed = [name for (name, old), (_, new) in zip(before, after, strict=True) if old is not new]
    assert not changed


def attempt(name: str, model: nn.Module, x: Tensor) -> str:
    """Patch to the budget and run once: "passed", or why not, which must be as pinned and as the test computes."""
    try:
        tokenprune.patch(model, flops=BUDGET)
        run(model, x)
    except tokenprune.UnsupportedModel:
        if name not in REFUSED:
            raise
        return "refused"
    except tokenprune.BudgetError as error:
        tokenprune.unpatch(model)
        assert_names_the_floor(model, x, str(error))
        return "floor"
    assert name not in REFUSED
    return "passed"


def assert_names_the_floor(model: nn.Module, x: Tensor, message: str) -> None:
    """The message names, to two digits, what is left when the default method removes all it can, counted here."""
    unpatched = cost(model, x)
    assert unpatched.outside > 0.5 * unpatched.total, "only a heavy stem makes the budget unreachable"
    fewest = 1
    try:
        tokenprune.patch(model, tokens=1)
    except tokenprune.BudgetError as error:
        fewest = int(re.findall(r"tokens=(\d+)", str(error))[-1])
        tokenprune.patch(model, tokens=fewest)
    floor = zoo.count(model, x).get_total_flops() / unpatched.total
    tokenprune.unpatch(model)
    assert max(BUDGET, unpatched.outside / unpatched.total) < floor < 1
    assert any(abs(float(number) - floor) < 0.006 for number in re.findall(r"0\.\d+", message)), (floor, message)


def ratio(model: nn.Module, x: Tensor, unpatched: Cost) -> float:
    """Counted FLOPs of the patched forward over those of the unpatched one; the report must say the same."""
    counted = zoo.count(model, x).get_total_flops() / unpatched.total
    report = tokenprune.report(model).to_dict()
    assert report["flops_ratio"] == pytest.approx(counted, abs=0.002)
    assert report["places"]
    assert all(place["tokens_out"] <= place["tokens_in"] for place in report["places"])
    assert report["places"][-1]["tokens_out"] < report["places"][0]["tokens_in"]
    return counted


@pytest.mark.parametrize("name", zoo.names())
def test_shrunk(name: str) -> None:
    model = zoo.create(name)
    x = zoo.inputs(model)
    reference, before = run(model, x), list(state(model))
    one = x[:1]  # relative position tables are computed once in a forward, whatever its batch
    unpatched = cost(model, one)

    outcome = attempt(name, model, one)
    if outcome == "passed":
        reduced = run(model, x)
        assert reduced.shape == reference.shape
        assert torch.isfinite(reduced).all()
        assert not torch.equal(reduced, reference)
        counted = ratio(model, one, unpatched)
        assert abs(counted - BUDGET) * unpatched.total <= unpatched.token
    if outcome != "refused":
        tokenprune.patch(model, keep=1.0)
        assert torch.equal(run(model, x), reference)
    tokenprune.unpatch(model)
    assert_same_state(before, list(state(model)))
    assert torch.equal(run(model, x), reference)
    outcomes["shrunk"][name] = outcome


@pytest.mark.full
@pytest.mark.parametrize("name", zoo.names())
def test_real_size(name: str) -> None:
    model = zoo.meta(name)
    x = zoo.inputs(model, batch=1)
    unpatched = cost(model, x)
    outcome = attempt(name, model, x)
    if outcome == "passed":
        assert ratio(model, x, unpatched) == pytest.approx(BUDGET, abs=0.01)
    outcomes["real size"][name] = outcome


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """The table over the names that ran before this test; with all of them it must be the pinned one."""
    assert len(REFUSED) <= 10
    pinned = json.loads(PINNED.read_text())
    for size, seen in outcomes.items():
        counts = Counter(seen.values())
        table = {outcome: counts[outcome] for outcome in ("passed", "floor", "refused")}
        with capsys.disabled():
            print(f"\ntimm names at flops={BUDGET}, {size}: {table} of {len(zoo.names())}")
        assert sorted(name for name in seen if seen[name] == "floor") == sorted(
            seen.keys() & set(pinned["floor"][size])
        )
        if len(seen) == len(zoo.names()) and timm.__version__ == pinned["timm"]:
            assert table == pinned[size]
