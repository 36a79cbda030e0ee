"""transformers' own common tests on a patched CLIP tower and a patched Llava: the same tests pass as unpatched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from host_suites import run_suite

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache"
PINNED = json.loads((HERE / "counts.json").read_text())["transformers"]
STUBS = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}
# They compare the shape of the first layer's states and attention maps with the prompt's, of which half the image's
# tokens are left.
FULL_LENGTH = {"test_hidden_states_output", "test_attention_outputs"}
# They run layers anew in backward, where tokens that left between layers are gone: refused, with the reason.
CHECKPOINTED = {
    "test_enable_input_require_grads_with_gradient_checkpointing",
    "test_training_gradient_checkpointing",
    "test_training_gradient_checkpointing_use_reentrant_false",
    "test_training_gradient_checkpointing_use_reentrant_true",
}
# They ask for attention maps, which a tower refuses where its tokens are reduced.
ATTENTION_MAPS = {
    "test_attention_outputs",
    "test_capture_outputs_decorator",
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
}
# What is patched, how, and the tests that cannot pass then. As many tokens as there are: all of them are kept, by
# scoring, ranking and gathering them.
PATCHES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "tower, 1.0": ("clip_tower", {"method": "top_k", "keep": 1.0}, set()),
    "tower, all gathered": ("clip_tower", {"method": "top_k", "tokens": 36}, ATTENTION_MAPS),
    "behind the tower, all gathered": ("llava", {"method": "top_k", "tokens": 16}, set()),
    "behind the tower, half": ("llava", {"method": "top_k", "keep": 0.5}, FULL_LENGTH),
    "between layers, all gathered": ("llava", {"method": "fastv", "place": 1, "tokens": 16}, CHECKPOINTED),
    "between layers, half": ("llava", {"method": "fastv", "place": 1, "keep": 0.5}, CHECKPOINTED),
}


def suite() -> Path:
    """A folder with the common tests of the installed transformers' source distribution, its two missing mixins as
    stubs, and our test classes."""
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
    for model in ("clip_tower", "llava"):
        shutil.copy(HERE / f"transformers_{model}.py", tests / f"test_{model}.py")
    return folder


def run(report: Path, model: str, patch: dict[str, Any] | None) -> dict[str, set[str]]:
    """The names of the tests that passed, failed and were skipped."""
    environment = {**os.environ, "TOKENPRUNE_PATCH": json.dumps(patch), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    run_suite(suite(), [f"--junitxml={report}", f"tests/test_{model}.py"], environment)
    found: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        found[outcome].add(case.attrib["name"])
    return found


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, set[str]]]:
    """The outcomes without a patch, by model; each is run once."""
    reports = tmp_path_factory.mktemp("unpatched")
    return cache(lambda model: run(reports / f"{model}.xml", model, None))


@pytest.mark.hosts
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", PATCHES)
def test_common_tests_pass_on_a_patched_model(
    case: str, unpatched: Callable[[str], dict[str, set[str]]], tmp_path: Path
) -> None:
    model, patch, excepted = PATCHES[case]
    plain, patched = unpatched(model), run(tmp_path / "patched.xml", model, patch)
    assert plain["failed"] == set()
    assert patched["failed"] == excepted
    assert patched["passed"] == plain["passed"] - excepted
    assert patched["skipped"] == plain["skipped"]
    pinned = PINNED.get(transformers.__version__, {}).get(model, {})
    assert {outcome: len(plain[outcome]) for outcome in pinned} == pinned
