"""Whatever is typed: it works, or it is wrong usage (2), or one line that says what failed (1); never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tokenprune import cli
from tokenprune.evals import bench
from tokenprune.evals.throughput import measure
from tokenprune.stored_schedule import StoredSchedule

MODELS = """
import timm
from torch import nn
def build():
    return timm.create_model('test_vit', img_size=32, patch_size=8, depth=3, num_classes=2).eval()
def convolutions():
    return timm.create_model('resnet10t', num_classes=2).eval()
def nothing():
    return None
def fails():
    raise RuntimeError('no weights\\nhere')
def takes(one):
    return one
value = 3
"""
NASTY = ["", " ", "x", "-1", "0", "nan", "inf", "1e400", "9" * 30, "0.5", "1,2", "é", "a\nb", "[]", "--", "None"]
FILES = ["", ".", "absent", "absent/x.json", "text.json", "zeros.safetensors", "broken/a/0.png", "x" * 300, "out.xyz"]
FILES += ["tiny.py", "/dev/null/x.json", "empty", "pictures", "prompts.txt"]
FUNCTIONS = ["nothing", "fails", "takes", "value", "absent", "convolutions"]
NAMES = [f"tiny:{name}" for name in FUNCTIONS] + ["absent:build", ":", "a:b:c", "no_such_model"]
NAMES += ["digit-reader", "vlm:absent", "owner/name", *NASTY]
METHODS = ["ltmp", "saint", "feather", "tomesd", "flip", "tomee", "", "x"]
# Of an option: what is typed most often, and what now and then.
TYPED: dict[str, tuple[list[str], list[str]]] = {
    "model": (["tiny:build"], NAMES),
    "other": (["tiny:build"], NAMES),
    "method": (["top_k", "tome"], METHODS),
    "anchor": (["top_k"], METHODS),
    "data": (["pictures", "pictures/a"], ["broken", "empty", "openclipart:absent", ":", *FILES]),
    "image": (["pictures/a/0.png"], FILES),
    "pictures": (["pictures/a"], ["broken/a", *FILES]),
    "real": (["pictures/a"], ["broken/a", *FILES]),
    "prompts": (["prompts.txt"], FILES),
    "clip": (["empty"], FILES),
    "checkpoint": (["weights.safetensors"], FILES),
    "schedule": (["schedule.json"], FILES),
    "inception": (["weights.safetensors"], FILES),
    "output": (["out.json"], FILES),
    "device": (["cpu"], ["cuda:77", "x", "meta", "", "cpu:0", "mps"]),
    "option": (["noise=0.3"], ["noise", "=", "x=1", "noise=[", "flops=1", "places=[1]", "places=[99]"]),
    "opt": (["adamw"], ["x", ""]),
    "sched": (["cosine"], ["x", ""]),
    "split": (["test"], ["x", ""]),
    "rounds": (["20"], ["3", *NASTY]),
    "samples": (["4"], NASTY),
    "flops": (["0.8"], ["2", "1e-9", *NASTY]),
    "resamples": (["10"], NASTY),
    "speedup": (["1.01"], NASTY),
    "workers": (["0"], ["1", *NASTY]),
}
OUTPUTS = {"compare": "out", "patterns": "out", "search": "out", "train": "out", "viz": "out.png"}
MOSTLY_NEEDED = {"data", "image", "method", "samples", "prompts", "batch_size"}
TAKES_MINUTES = ({"demo"}, {"demo-diffusion"}, {"methods", "--table"}, {"train", "digits-vit"})


def typed(action: argparse.Action) -> tuple[list[str], list[str]]:
    """What might be typed behind an option: what is right for most, and what is mostly wrong."""
    if action.dest in TYPED:
        return TYPED[action.dest]
    if action.choices:
        return [*map(str, action.choices)], ["x"]
    if action.type is float:
        return ["0.6", "0.5", "1"], ["2", "1e-9", *NASTY]
    return ["1", "2", "3"], NASTY


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    known = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    name = draw(st.sampled_from(sorted(known)))
    words = [name]
    for action in known[name]._actions:
        likely = 8 if action.dest in MOSTLY_NEEDED else 1
        if action.dest == "help" or not (action.required or draw(st.integers(0, 9)) < likely):
            continue
        right, wrong = typed(action)
        if action.dest == "output":
            right = [OUTPUTS.get(name, "out.json")]
        value = [] if action.nargs == 0 else [draw(st.sampled_from(wrong if draw(st.integers(0, 4)) == 0 else right))]
        words += ([max(action.option_strings, key=len)] if action.option_strings else []) + value
    return words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with good and bad pictures, files that are not what their names say, and models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "tiny.py").write_text(MODELS)
    for name in ("pictures", "broken"):
        for index, label in enumerate("ab"):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40, 36), (80 * index, 40 * number, 9)).save(tmp_path / name / label / f"{number}.png")
    picture = tmp_path / "broken" / "a" / "0.png"
    picture.write_bytes(picture.read_bytes()[:50])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "zeros.safetensors").write_bytes(bytes(64))
    namespace: dict[str, Any] = {}
    exec(MODELS, namespace)
    save_file(namespace["build"]().state_dict(), tmp_path / "weights.safetensors")
    StoredSchedule("top_k", {1: 0.5}).save(tmp_path / "schedule.json")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("tiny", None)


def run(words: list[str]) -> tuple[int, str]:
    """The exit code and what stands on standard error."""
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        try:
            code = cli.main(words)
        except SystemExit as stopped:
            code = stopped.code
    return code, told.getvalue()


@settings(max_examples=settings.default.max_examples // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=commands().filter(lambda words: not any(these <= set(words) for these in TAKES_MINUTES)))
def test_any_command(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note(" ".join(map(repr, words)))
    monkeypatch.setitem(bench.__globals__, "measure", partial(measure, sample_seconds=0))
    shutil.rmtree("out", ignore_errors=True)
    code, told = run(words)
    note(told)
    if code == 2:
        assert "usage: tokenprune" in told
    elif code == 1 and words[0] != "doctor":  # whose table says what is wrong
        assert [line.startswith("tokenprune: error: ") for line in told.splitlines()].count(True) == 1
        assert told.splitlines()[-1].startswith("tokenprune: error: ")
    else:
        assert code in (0, 1)


# Each found with the commands above.
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("eval --data pictures --method top_k --seed 99999999999999999999", 2, "--seed: 99999999999999999999 is not"),
        ("eval --data pictures --method top_k --threads 100000", 2, "--threads: 100000 is not from 1 to 1024"),
        ("eval --data pictures --method top_k --workers -1", 2, "--workers: -1 is not from 0"),
        ("bench --method top_k --batch-size 99999999999999999999", 2, "--batch-size"),
        ("bench --method top_k --batch-size 2000000000", 1, "out of memory"),
        ("eval --data pictures --method top_k --device meta", 1, "--device meta: its tensors have no values"),
        ("eval --data broken --method top_k", 1, "broken/a/0.png is no picture that can be read: image file is"),
        ("eval --data broken --method top_k --workers 1", 1, "error: broken/a/0.png is no picture that can be read"),
        ("viz --image broken/a/0.png --method top_k", 1, "broken/a/0.png is no picture that can be read"),
        ("viz --image pictures/a/0.png --method top_k --keep 1", 1, "every token stays"),
        ("patterns --data pictures --method top_k --keep 1 --output out", 1, "every token stays"),
        ("report --schedule broken/a/0.png", 1, "no schedule that tokenprune search has written: invalid start byte"),
        (
            "train --method ltmp --flops 0.8 --data pictures --batch-size 2 --opt x --output out",
            1,
            "opt='x' is none of",
        ),
        (
            "train --method ltmp --flops 0.8 --data pictures --batch-size 2 --learning-rate -1 --output out",
            1,
            "at least 0",
        ),
        ("report --model tiny:fails", 1, "tiny:fails could not be called: RuntimeError: no weights here"),
        ("report --model :", 1, "could not be called"),
    ],
)
def test_what_was_a_traceback(arguments: str, code: int, message: str, folder: Path) -> None:
    name, *rest = arguments.split()
    model = [] if "--model" in rest else ["tiny:build"] if name == "train" else ["--model", "tiny:build"]
    found, told = run([name, *model, *rest, "--quiet"])
    assert found == code
    assert message in told.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pictures pictures/a --prompts broken/a/0.png", "one of the prompts a line"),
        pytest.param("--pictures broken/a --real pictures/a", "broken/a/0.png is no picture", marks=pytest.mark.full),
        pytest.param(
            "--pictures pictures/a --real pictures/a --inception zeros.safetensors",
            "torch-fidelity failed",
            marks=pytest.mark.full,
        ),
    ],
)
def test_scores_of_what_cannot_be_read(arguments: str, message: str, folder: Path) -> None:
    code, told = run(["score", *arguments.split()])
    assert code == 1
    assert message in told


def test_a_comparison_that_failed_before_it_measured_locks_no_folder(folder: Path) -> None:
    command = ["compare", "--model", "tiny:build", "--method", "top_k", "--samples", "4", "--output", "out", "--quiet"]
    assert run([*command, "--data", "absent"])[0] == 1
    assert "other settings" not in run([*command, "--data", "broken"])[1]
