"""One thread, so that neither timings nor the last bits depend on the machine's load; and no skip goes unseen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tokenprune import registry

# The same examples in every run, and with --hypothesis-profile=full many new ones in each.
settings.register_profile("fixed", max_examples=20, derandomize=True, database=None, deadline=None)
settings.register_profile("full", max_examples=500, database=None, deadline=None, print_blob=True)
settings.load_profile("fixed")

torch.set_num_threads(1)
os.environ["TOKENPRUNE_CACHE"] = os.devnull  # no latency table of this machine's

# Name of a test (or file): the reason with which it may be skipped.
SKIPPED: dict[str, str] = json.loads(Path(__file__).with_name("counts.json").read_text())["skipped"]
unpinned: dict[str, str] = {}


def compare(name: str, reason: str | None) -> None:
    """Note a skip that is not pinned with its reason (None: it was not skipped), or a pinned one that ran."""
    if SKIPPED.get(name) != reason:
        unpinned[name] = reason or "it ran, and is pinned as skipped"


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        compare(report.nodeid, reason_of(report))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped or report.when == "call":
        compare(report.nodeid, reason_of(report) if report.skipped else None)


def reason_of(report: pytest.CollectReport | pytest.TestReport) -> str:
    """What the skip or the expected failure says of itself."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    return str(reason).removeprefix("Skipped: ")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unpinned and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")}
    for report in terminalreporter.stats.get("passed", []):
        for name, table in report.user_properties:
            terminalreporter.write_line(f"{name}: {table}")
    terminalreporter.write_line(f"{counts}, {len(SKIPPED)} pinned as skipped")
    for name, reason in unpinned.items():
        terminalreporter.write_line(f"NOT AS PINNED {name}: {reason}", red=True)


@pytest.fixture(scope="module", autouse=True)
def _methods_stay() -> Iterator[None]:
    """What a file's tests register is not there for those of the next file."""
    before = set(registry._METHODS)
    yield
    for name in set(registry._METHODS) - before:
        if not str(registry._METHODS[name].__module__).startswith("tokenprune."):  # the package's load when asked for
            del registry._METHODS[name]
