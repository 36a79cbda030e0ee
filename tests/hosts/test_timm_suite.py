"""timm's own test-suite on models patched at 1.0: the same tests pass and none fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
from host_suites import run_suite

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache"
PINNED = json.loads((HERE / "counts.json").read_text())["timm"]


def suite() -> Path:
    """The folder with the tests of the installed timm's source distribution; its copy of the package stays packed."""
    name = f"timm-{timm.__version__}"
    folder = CACHE / name
    if not (folder / "tests").exists():
        CACHE.mkdir(exist_ok=True)
        requirement = f"timm=={timm.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", requirement]
        subprocess.run([*pip, "--dest", str(CACHE)], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            wanted = (f"{name}/tests/", f"{name}/pyproject.toml")
            archive.extractall(
                CACHE, [member for member in archive.getmembers() if member.name.startswith(wanted)], filter="data"
            )
    return folder


def run(counts: Path, *options: str) -> dict[str, int]:
    """Run the ViT subset (see the plug-in) and return how many tests passed, failed and were skipped."""
    markers = "base or cfg or forward or backward or features or fxforward or fxbackward"
    arguments = ["-p", "timm_plugin", "-m", markers, "--counts", str(counts), *options, "tests/test_models.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    run_suite(suite(), arguments, environment)
    assert counts.exists(), "the suite did not run"
    return json.loads(counts.read_text())


@pytest.mark.hosts
@pytest.mark.timeout(7200)
def test_suite_passes_on_patched_models(tmp_path: Path) -> None:
    plain = run(tmp_path / "unpatched.json")
    patched = run(tmp_path / "patched.json", "--keep", "1.0")
    assert patched["failed"] == patched["error"] == patched["refused"] == 0
    assert patched["patched"] == patched["created"] > 0
    assert (patched["passed"], patched["skipped"]) == (plain["passed"], plain["skipped"])
    pinned = PINNED.get(timm.__version__, {})
    assert {outcome: patched[outcome] for outcome in pinned} == pinned
