"""The examples as modules, for tests to run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """examples/`name`.py, or the package of that name."""
    package = EXAMPLES / name / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, package if package.exists() else EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
