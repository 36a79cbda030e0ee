"""Every command that a page shows is run, or is a step of continuous integration; what is in neither list fails."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from documented import ADDED, CHEAPER, ELSEWHERE, LONG, PARSED, PLACEHOLDERS
from documents import PAGES, ROOT, Command, commands

from tokenprune import cli

pytestmark = pytest.mark.usefixtures("folder", "small", "once")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(page: str) -> None:
    assert not (failed := failures(page, long=False)), "\n".join(failed)


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES)
def test_the_long_ones_too(page: str) -> None:
    assert not (failed := failures(page, long=True)), "\n".join(failed)


def test_what_is_run_elsewhere_is_there() -> None:
    for command, place in ELSEWHERE.items():
        file, _, test = place.partition("::")
        assert (ROOT / file).is_file(), place
        words = f"def {test}(" if test else command.split()[-1]
        assert words in (ROOT / file).read_text(encoding="utf-8"), f"{command} is not run by {place}"


def test_no_table_has_an_entry_too_many() -> None:
    shown = [line for page in PAGES for command in commands(page) for line in lines_of(command)]
    for table in (CHEAPER, ADDED, PLACEHOLDERS, LONG, ELSEWHERE, PARSED):
        assert [entry for entry in table if not any(fits(entry, line) for line in shown)] == []


@pytest.mark.parametrize(
    "text",
    [
        "tokenprune eval --model digits-vit --flopz 0.6",
        "tokenprune evaluate --model digits-vit",
        "tokenprune eval --model no-such-model",
        "make no-such-target",
        "python -m tokenprune.evals.no_such_module",
        "pip install 'tokenprune-torch[no-such-extra]'",
        "pip install no-such-package",
        "ls docs",
    ],
)
def test_a_command_that_does_not_work_is_seen(text: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        run(Command(text, "here"))


def failures(page: str, *, long: bool) -> list[str]:
    """What went wrong of the page's commands, which are run in their order: a later one may need what one wrote."""
    earlier = set() if long else {one.text for other in PAGES[: PAGES.index(page)] for one in commands(other)}
    failed, done = list[str](), set[str]()
    for command in commands(page):
        for line in lines_of(command) if command.text not in earlier else ():
            if line not in done and (long or not matching(LONG, line)):
                done.add(line)
                try:
                    run(Command(line, command.where, command.inline))
                except (Exception, SystemExit) as error:
                    failed.append(f"{command.where}: {line}\n    {type(error).__name__}: {str(error)[:300]}")
    return failed


def lines_of(command: Command) -> list[str]:
    """The command, or what make would run for it, where that is nothing of ELSEWHERE or PARSED."""
    program, *arguments = shlex.split(command.text)
    if program != "make" or matching(ELSEWHERE, command.text) or matching(PARSED, command.text):
        return [command.text]
    return recipe(arguments)


def recipe(arguments: list[str]) -> list[str]:
    """The commands that make would run, without the installation."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "--no-print-directory", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    ran = [line.replace(".venv/bin/", "") for line in done.stdout.splitlines()]
    known = [line for line in ran if line.startswith(("python -m tokenprune", "python -m pytest", "tokenprune"))]
    assert known, f"make {shlex.join(arguments)} runs nothing that is known here"
    return known


def run(command: Command) -> None:
    """Raises for a command that fails, that nothing here knows, or whose words the parsers refuse."""
    program, *arguments = shlex.split(command.text)
    if matching(ELSEWHERE, command.text):
        return
    only_parsed = bool(matching(PARSED, command.text))
    if program == "make" and only_parsed:
        paths_are_there(recipe(arguments))
    elif program == "pip":
        extras_are_there(arguments, others=only_parsed)
    elif program == "eval":
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(["bash", "-ec", command.text], check=True, env={**os.environ, "PATH": path})
    elif program == "accelerate" and arguments == ["launch"]:
        assert command.inline
    elif program == "tokenprune" and command.inline and is_name(arguments):
        assert {word for word in arguments[1:] if word.startswith("--")} <= options_of(arguments[0])
    else:
        executed(program, cheaper(command.text, arguments), only_parsed=only_parsed)


def executed(program: str, arguments: list[str], *, only_parsed: bool) -> None:
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert arguments.pop(0) == "launch"
        launched = launch_command_parser().parse_args(arguments)
        arguments = [*(["-m"] if launched.module else []), launched.training_script, *launched.training_script_args]
        program = "python"
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(arguments)
        arguments = [*(["-m"] if launched.module else []), launched.training_script, *launched.training_script_args]
        program = "python"
    if program == "python" and arguments[0] != "-m":
        with mock.patch.object(sys, "argv", arguments):
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        return
    assert program in ("tokenprune", "python"), f"nothing here runs {program}"
    module = importlib.import_module("tokenprune.cli" if program == "tokenprune" else arguments[1])
    arguments = arguments if program == "tokenprune" else arguments[2:]
    with mock.patch.object(argparse.ArgumentParser, "parse_args", told if only_parsed else PARSE_ARGS):
        try:
            status = module.main(arguments)
        except Told:
            return
        except SystemExit as stopped:
            status = stopped.code
    assert status in (0, None), f"it exits with {status}"


PARSE_ARGS = argparse.ArgumentParser.parse_args


class Told(Exception):
    """The arguments were parsed."""


def told(parser: argparse.ArgumentParser, arguments: Any = None) -> None:
    PARSE_ARGS(parser, arguments)
    raise Told


def cheaper(text: str, arguments: list[str]) -> list[str]:
    """The arguments with what the tables of `documented` put in their place."""
    placeholders = PLACEHOLDERS.get(matching(PLACEHOLDERS, text), {})
    arguments = [placeholders.get(word, word) for word in arguments]
    for option, value in CHEAPER.get(matching(CHEAPER, text), {}).items():
        while option in arguments:
            place = arguments.index(option)
            del arguments[place : place + 2]
        for one in [value] if isinstance(value, str) else value:
            arguments += [option, one]
    for option, one in ADDED.get(matching(ADDED, text), {}).items():
        arguments += [] if option in arguments else [option, one]
    return arguments


def matching(table: Any, text: str) -> str:
    """The longest entry with which the command begins, "" for none."""
    return max((entry for entry in table if fits(entry, text)), key=len, default="")


def fits(entry: str, text: str) -> bool:
    return text == entry or text.startswith(f"{entry} ")


def is_name(arguments: list[str]) -> bool:
    """Whether no option has a value, as in "`tokenprune bench --profile`", which names a command and runs none."""
    given = [word for word in arguments[1:] if not word.startswith("--")]
    return len(given) <= 1 and "--help" not in arguments and not matching(PARSED, "tokenprune " + " ".join(arguments))


def options_of(name: str) -> set[str]:
    [commands] = [action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return {option for action in commands.choices[name]._actions for option in action.option_strings}


def paths_are_there(lines: list[str]) -> None:
    assert lines
    for line in lines:
        for word in shlex.split(line):
            assert not word.startswith("tests/") or (ROOT / word).exists(), word


def extras_are_there(arguments: list[str], *, others: bool) -> None:
    """Of `pip install` of this package; `others`: of packages that are somebody else's, too."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1].split("[project.")[0], re.M)
    assert arguments[0] == "install"
    for word in arguments[1:]:
        match = re.fullmatch(r"(\.|tokenprune-torch)(?:\[([\w,]+)\])?", word)
        if word in ("-e", "-U") or (others and not match):
            continue
        assert match, f"nobody knows whether {word} can be installed"
        assert match[2] is None or set(match[2].split(",")) <= set(extras)
