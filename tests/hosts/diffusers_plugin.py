"""pytest plug-in for diffusers' own test-suite: every denoiser of the classes named here that a test makes is patched.

Options: `--patch` (the arguments of `tokenprune.patch`, as JSON; without it nothing is patched, for the baseline) and
`--outcomes` (a JSON file to write).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CLASSES = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel")
# Mixins of the suite whose tests are run, by how its test classes end; the others need an accelerator or the network.
ENDINGS = ("DiTTransformer2D", "PixArtTransformer2D", "SD3Transformer", "SD35Transformer", "UNet2DCondition")
KINDS = ("", "Memory", "Training", "Attention")
# They read configurations from the hub.
DOWNLOADS = ("_from_pretrained_config", "test_correct_class_remapping", "_hub")

# Imported by the suite's modules, for tests of downloads alone.
ABSENT = ("requests_mock",)

outcomes: dict[str, str] = {}
made = {"patched": 0}
inside = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--patch", default=None, help="patch every denoiser with these arguments, as JSON")
    parser.addoption("--outcomes", type=Path, default=None, help="write the outcome of each test to this JSON file")


def patching(make: Callable[..., Any], patch: dict[str, Any], *, makes: bool) -> Callable[..., Any]:
    """An `__init__`, or where it `makes` a model a `from_pretrained`, after which the model is patched. The outermost
    call patches: weights that come are still on their way in an inner one."""

    @functools.wraps(make)
    def wrapper(first: Any, *arguments: Any, **named: Any) -> Any:
        import tokenprune

        global inside
        outermost, inside = not inside, True
        try:
            found = make(first, *arguments, **named)
        finally:
            inside = not outermost
        if outermost:
            tokenprune.patch(found if makes else first, **patch)
            made["patched"] += 1
        return found

    return wrapper


def pytest_configure(config: pytest.Config) -> None:
    for name in ABSENT:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
    if config.getoption("--patch") is None:
        return
    import diffusers

    patch = json.loads(config.getoption("--patch"))
    for name in CLASSES:
        cls = getattr(diffusers, name)
        loads = cls.from_pretrained.__func__
        cls.__init__ = patching(cls.__init__, patch, makes=False)
        cls.from_pretrained = classmethod(patching(loads, patch, makes=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    classes = {f"Test{ending}{kind}" for ending in ENDINGS for kind in KINDS}

    def wanted(item: pytest.Item) -> bool:
        test: Any = item
        of_class = getattr(test.cls, "__name__", None) in classes
        return of_class and not any(part in item.name for part in DOWNLOADS)

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = "::".join(report.nodeid.split("::")[1:])
    if report.when == "call" or report.outcome != "passed":
        outcomes[name] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--outcomes")
    if path is not None:
        path.write_text(json.dumps({"outcomes": outcomes, **made}))
