"""The parts of lmms-eval that the example relies on are as pinned; its source is read, it is not installed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache"
PINNED = json.loads((HERE / "lmms_eval.json").read_text())


@pytest.mark.hosts
def test_what_is_pinned_is_what_lmms_eval_has() -> None:
    CACHE.mkdir(exist_ok=True)
    wheel = CACHE / f"lmms_eval-{PINNED['version']}-py3-none-any.whl"
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"lmms-eval=={PINNED['version']}"]
        subprocess.run([*pip, "--dest", str(CACHE)], check=True)
    with zipfile.ZipFile(wheel) as archive:
        found = {path: _definitions(archive.read(path).decode()) for path in PINNED["signatures"]}
        models = archive.read("lmms_eval/models/__init__.py").decode()
    for path, pinned in PINNED["signatures"].items():
        assert {name: found[path][name] for name in pinned} == pinned
    assert "MODEL_REGISTRY_V2 = " in models


def _definitions(source: str) -> dict[str, list[str]]:
    """{function, method or dataclass: its parameters or fields}."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _parameters(node)
        if isinstance(node, ast.ClassDef):
            found[node.name] = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]  # type: ignore[union-attr]
            found |= {
                f"{node.name}.{part.name}": _parameters(part) for part in node.body if isinstance(part, ast.FunctionDef)
            }
    return found


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    parts = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return [part.arg for part in parts if part is not None]
