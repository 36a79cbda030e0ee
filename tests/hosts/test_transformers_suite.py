"""transformers' own common tests on a CLIP tower patched at 1.0: the same tests pass as unpatched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache"
STUBS = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}


def suite() -> Path:
    """A folder with the common tests of the installed transformers' source distribution, its two missing mixins as
    stubs, and the tower's test class."""
    name = f"transformers-{transformers.__version__}"
    folder = CACHE / name
    if not (folder / "tests").exists():
        CACHE.mkdir(exist_ok=True)
        requirement = f"transformers=={transformers.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", requirement]
        subprocess.run([*pip, "--dest", str(CACHE)], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            wanted = [member for member in archive.getmembers() if member.name.startswith(f"{name}/tests/")]
            archive.extractall(CACHE, wanted, filter="data")
    tests = folder / "tests"
    (tests / "__init__.py").touch()
    for path, mixin in STUBS.items():
        (tests / path).parent.mkdir(exist_ok=True)
        (tests / path).with_name("__init__.py").touch()
        (tests / path).write_text(f"class {mixin}:\n    pass\n")
    shutil.copy(HERE / "transformers_clip_tower.py", tests / "test_clip_tower.py")
    return folder


def run(report: Path, keep: str) -> dict[str, set[str]]:
    """The names of the tests that passed, failed and were skipped."""
    environment = {**os.environ, "TOKENPRUNE_KEEP": keep, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:timeout",
        f"--junitxml={report}",
    ]
    result = subprocess.run(
        [*command, "tests/test_clip_tower.py"],
        cwd=suite(),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(result.stdout[-20000:])
    found: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        found[outcome].add(case.attrib["name"])
    return found


@pytest.mark.hosts
@pytest.mark.timeout(3600)
def test_common_tests_pass_on_a_patched_tower(tmp_path: Path) -> None:
    plain = run(tmp_path / "unpatched.xml", "")
    patched = run(tmp_path / "patched.xml", "1.0")
    assert len(plain["passed"]) > 80
    assert patched["failed"] - plain["failed"] == set()
    assert patched["passed"] == plain["passed"]
