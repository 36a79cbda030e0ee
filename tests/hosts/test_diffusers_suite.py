"""diffusers' own tests of its denoisers, patched at 1.0: the same tests pass as unpatched, and none fails."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
from host_suites import run_suite

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache"
PINNED = json.loads((HERE / "counts.json").read_text())["diffusers"]
REPOSITORY = "https://github.com/huggingface/diffusers"
FILES = (
    "tests/models/transformers/test_models_dit_transformer2d.py",
    "tests/models/transformers/test_models_pixart_transformer2d.py",
    "tests/models/transformers/test_models_transformer_sd3.py",
    "tests/models/unets/test_models_unet_2d_condition.py",
)


def suite() -> Path:
    """The folder with the tests of the installed diffusers, whose source distribution has none: of its tag."""
    folder = CACHE / f"diffusers-{diffusers.__version__}"
    if not (folder / "tests").exists():
        CACHE.mkdir(exist_ok=True)
        clone = ["git", "clone", "--quiet", "--depth", "1", "--filter", "blob:none", "--sparse"]
        tag = ["--branch", f"v{diffusers.__version__}", REPOSITORY, str(folder)]
        subprocess.run([*clone, *tag], check=True)
        subprocess.run(["git", "-C", str(folder), "sparse-checkout", "set", "tests"], check=True)
    return folder


def run(found: Path, patch: dict[str, Any] | None) -> dict[str, Any]:
    """The outcome of each test of `FILES` by its name, and how many models were patched."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DIFFUSERS_TEST_DEVICE": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    options = ["--outcomes", str(found), *([] if patch is None else ["--patch", json.dumps(patch)])]
    run_suite(suite(), ["-p", "diffusers_plugin", *options, *FILES], environment)
    assert found.exists(), "the suite did not run"
    outcomes: dict[str, Any] = json.loads(found.read_text())
    return outcomes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("unpatched") / "outcomes.json", None)


@pytest.mark.hosts
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", ["tomesd", "at_edm"])
def test_suite_passes_on_patched_denoisers(method: str, plain: dict[str, Any], tmp_path: Path) -> None:
    patched = run(tmp_path / "patched.json", {"method": method, "keep": 1.0})
    assert plain["patched"] == 0
    assert patched["patched"] > 0
    assert "failed" not in plain["outcomes"].values()
    assert patched["outcomes"] == plain["outcomes"]
    pinned = PINNED.get(diffusers.__version__, {})
    counted = Counter(plain["outcomes"].values())
    assert {outcome: counted[outcome] for outcome in pinned} == pinned
