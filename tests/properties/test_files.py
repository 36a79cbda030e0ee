"""Files that are read: whatever is cut off, changed or was never one of ours is one of our errors, and no traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, images, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learned_thresholds import parts
from torch import Tensor, nn

import tokenprune
from tokenprune import TokenPruneError
from tokenprune.latency import LatencyRow, LatencyTable, table_path
from tokenprune.stored_schedule import StoredSchedule

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 0.5, 10**400])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
of_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
model = cache(lambda: build("class_token"))


@cache
def plain() -> Tensor:
    return run(tokenprune.unpatch(model()), images(model()))


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """What a disk or a copy does to a file: cut off, a bit flipped, a piece gone or put in."""
    kind = draw(st.sampled_from(["cut", "flip", "gone", "put in"]))
    place, junk = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=8))
    bit = draw(st.integers(0, 7))

    def damage(content: bytes) -> bytes:
        at = int(place * len(content))
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
        return content[:at] + {"cut": b"", "gone": content[at + len(junk) :], "put in": junk + content[at:]}[kind]

    return damage


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """JSON of ours in which one value, at any depth, is another."""
    value, steps = draw(JSON), draw(st.lists(st.integers(0, 9), max_size=4))
    gone = draw(st.booleans())

    def change(content: bytes) -> bytes:
        data = json.loads(content)
        inner, path = data, steps
        while isinstance(inner, (dict, list)) and inner and path:
            key = list(inner)[path[0] % len(inner)] if isinstance(inner, dict) else path[0] % len(inner)
            if len(path) == 1 or not isinstance(inner[key], (dict, list)) or not inner[key]:
                if gone:
                    del inner[key]
                else:
                    inner[key] = value
                return json.dumps(data).encode()
            inner, path = inner[key], path[1:]
        return json.dumps(value).encode()

    return change


def values(data: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value in JSON, at any depth."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (key,)
        yield from ((key, *rest) for rest in values(data[key]))


def spoilt(content: bytes) -> Iterator[bytes]:
    """JSON of ours with each of its values in turn another, of each kind; and what no parser takes in."""
    data = json.loads(content)
    for path in values(data):
        for value in (None, True, -1, 2**31, 2**64, 1e308, 10**400, float("nan"), "x", [], {"1": [None]}):
            other = copy.deepcopy(data)
            inner = other
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            yield json.dumps(other).encode()
    yield re.sub(rb"0\.[0-9]+", b"9" * 5000, content)  # more digits than Python reads
    yield b"[" * 100_000


def patches_or_refuses(target: nn.Module, **arguments: Any) -> None:
    """Patched, it runs; refused, it is in one of our errors, and the model is as it was."""
    x = images(target)
    with contextlib.suppress(TokenPruneError):
        tokenprune.patch(target, **arguments)
        assert run(target, x).shape == plain().shape
    tokenprune.unpatch(target)
    assert torch.equal(run(target, x), plain())


OPTIONS: dict[str, dict[str, Any]] = {
    "tome": {"proportional": True},
    "zero_tprune": {"iterations": 5, "variance": [0.01, 0.7]},
}


def schedule_file(method: str, folder: Path) -> Path:
    file = folder / "schedule.json"
    StoredSchedule(method, {1: 0.7, 2: 0.5}, OPTIONS[method], {"flops_ratio": 0.7}, "regression").save(file)
    return file


def described_file(folder: Path) -> Path:
    parts(model(), [0.8] * 4, [0.01] * 4).save(folder)
    return folder / "learned.json"


def table_file() -> Path:
    file = table_path(model())
    row = LatencyRow(2, 35, (1.0, 0.8, 0.5), (1.0, 0.9, 0.6), {"top_k": 0.01})
    LatencyTable((row,), {"trusted": True}).save(file)
    return file


@of_a_folder
@given(damage=damages() | changes())
@pytest.mark.parametrize("method", OPTIONS)
def test_schedules(method: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = schedule_file(method, tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    patches_or_refuses(model(), schedule=file)


@pytest.mark.parametrize("method", OPTIONS)
def test_every_value_of_a_schedule(method: str, tmp_path: Path) -> None:
    file = schedule_file(method, tmp_path)
    for content in spoilt(file.read_bytes()):
        file.write_bytes(content)
        patches_or_refuses(model(), schedule=file)


@of_a_folder
@given(damage=damages() | changes())
def test_what_learned_parts_say_of_themselves(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = described_file(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    patches_or_refuses(model(), weights=tmp_path)


def test_every_value_of_what_learned_parts_say(tmp_path: Path) -> None:
    file = described_file(tmp_path)
    for content in spoilt(file.read_bytes()):
        file.write_bytes(content)
        patches_or_refuses(model(), weights=tmp_path)


@of_a_folder
@given(damage=damages())
def test_learned_parts(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    parts(model(), [0.8] * 4, [0.01] * 4).save(tmp_path)
    file = tmp_path / "learned.safetensors"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    if file.read_bytes() == whole:
        return
    with pytest.raises(TokenPruneError):
        tokenprune.patch(model(), weights=tmp_path)


def test_one_bit_of_the_weights_is_enough(tmp_path: Path) -> None:
    parts(model(), [0.8] * 4, [0.01] * 4).save(tmp_path)
    file = tmp_path / "learned.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # as long, and as good a file of safetensors
    with pytest.raises(TokenPruneError, match="cut off, changed"):
        tokenprune.patch(model(), weights=tmp_path)


@of_a_folder
@given(damage=damages() | changes())
@pytest.mark.filterwarnings("ignore:by the latency table")
def test_latency_tables(damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path))
    file = table_file()
    file.write_bytes(damage(file.read_bytes()))
    patches_or_refuses(model(), method="top_k", flops=0.7)


@pytest.mark.filterwarnings("ignore:by the latency table")
def test_every_value_of_a_latency_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path))
    file = table_file()
    for content in spoilt(file.read_bytes()):
        file.write_bytes(content)
        patches_or_refuses(model(), method="top_k", flops=0.7)
