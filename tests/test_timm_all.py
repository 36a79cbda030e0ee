"""Every name of timm's plain-ViT modules, through the public contract only."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
PINNED = json.loads(Path(__file__).with_name("counts.json").read_text())

outcomes: dict[str, dict[str, str]] = {"shrunk": {}, "real size": {}}
reduced_at: dict[str, dict[str, str]] = {}  # name: {block class: "between" attention and MLP or "behind" the block}


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
    """The message names, to two digits, what is left when the method chosen for this budget, ToMe, halves in every
    block."""
    unpatched = cost(model, x)
    assert unpatched.outside > 0.5 * unpatched.total, "only a heavy stem makes the budget unreachable"
    tokens = tokenprune.report(tokenprune.patch(model, "tome", keep=0.5)).to_dict()["tokens"]
    halves = {}
    for block in range(len(model.blocks)):
        halves[block] = (tokens - tokens // 2) / tokens
        tokens -= tokens // 2
    tokenprune.patch(model, "tome", schedule=halves)
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


def block_classes(model: nn.Module) -> dict[str, str]:
    """The class of each block, with its module: two of timm's have the same name."""
    classes = {f"blocks.{i}": type(block) for i, block in enumerate(model.blocks)}
    return {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}" for name, cls in classes.items()}


def where_reduced(model: nn.Module, x: Tensor, classes: dict[str, str]) -> dict[str, str]:
    """Class of each reducing block: "between" where a part of such a block saw the tokens that are left, "behind" where
    all its parts ran on those that entered. The report must say the same."""
    seen: dict[str, set[int]] = defaultdict(set)

    def note(name: str, part: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], Tensor) and args[0].ndim == 3:
            seen[name].add(args[0].shape[1])

    handles = [
        part.register_forward_pre_hook(partial(note, name))
        for name in classes
        for part in model.get_submodule(name).modules()
        if part is not model.get_submodule(name)
    ]
    run(model, x)
    for handle in handles:
        handle.remove()
    report = tokenprune.report(model).to_dict()
    where: dict[str, str] = {}
    for place in report["places"]:
        name = place["name"]
        if place["tokens_out"] == place["tokens_in"]:
            continue
        how = "between" if report["num_prefix_tokens"] + place["tokens_out"] in seen[name] else "behind"
        assert (name in report["skipped"]) == (how == "behind")
        assert where.setdefault(classes[name], how) == how
    return where


@pytest.mark.parametrize("name", zoo.names())
def test_shrunk(name: str) -> None:
    model = zoo.create(name)
    x = zoo.inputs(model)
    reference, before, classes = run(model, x), list(state(model)), block_classes(model)
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
        reduced_at[name] = where_reduced(model, one, classes)
        for block, how in reduced_at[name].items():
            assert how == ("behind" if block in PINNED["behind"] else "between"), block
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


def test_counts(record_property: Callable[[str, object], None]) -> None:
    """The table over the names that ran before this test; with all of them it must be the pinned one."""
    assert len(REFUSED) <= 10
    for size, seen in outcomes.items():
        counts = Counter(seen.values())
        table = {outcome: counts[outcome] for outcome in ("passed", "floor", "refused")}
        record_property(f"timm names at flops={BUDGET}, {size}", f"{table} of {len(zoo.names())}")
        assert sorted(name for name in seen if seen[name] == "floor") == sorted(
            seen.keys() & set(PINNED["floor"][size])
        )
        if len(seen) == len(zoo.names()) and timm.__version__ == PINNED["timm"]:
            assert table == PINNED[size]


def test_reduction_points(record_property: Callable[[str, object], None]) -> None:
    """Only blocks that run attention and MLP in parallel are reduced behind them: a silent slide from between to
    behind would cost a share of the saving in every block."""
    by_block: dict[str, dict[str, list[str]]] = {"between": defaultdict(list), "behind": defaultdict(list)}
    for name, where in reduced_at.items():
        for block, how in where.items():
            by_block[how][block].append(name)
    for how, blocks in by_block.items():
        for block, names in blocks.items():
            listed = f": {', '.join(names)}" if how == "behind" else ""
            record_property(f"timm names reduced {how} {block}", f"{len(names)}{listed}")
    if len(reduced_at) == len(zoo.names()) and timm.__version__ == PINNED["timm"]:
        assert {block: sorted(names) for block, names in by_block["behind"].items()} == PINNED["behind"]
        assert {block: len(names) for block, names in by_block["between"].items()} == PINNED["between"]
