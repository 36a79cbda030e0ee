"""Methods and adapters of third parties, by decorator and by entry point."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch

import tokenprune
from tokenprune import registry
from tokenprune.registry import make_method, register_method

ROOT = Path(__file__).parents[1]


def run_example(name: str) -> str:
    """What the example prints, run as a program: what it registers stays its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_a_vit_that_no_library_ships_runs() -> None:
    told = run_example("custom_vit.py")
    assert "torch.Size([2, 10])" in told
    assert "zero_tprune" in told
    assert "0.6" in told


def test_the_example_of_a_method_runs_and_beats_an_even_choice() -> None:
    read = dict(re.findall(r"(\w+): (\d\.\d\d) of the digits read", run_example("custom_method.py")))
    assert set(read) == {"rarest", "top_k", "uniform"}
    assert float(read["rarest"]) > float(read["uniform"])


def test_a_method_in_a_few_lines() -> None:
    @register_method("by_norm")
    def by_norm(*, rate: float = 0.5) -> tokenprune.registry.Method:
        """Keep the longest tokens."""
        from tokenprune.method import Method
        from tokenprune.schedule import Stages
        from tokenprune.selection.top_k import keep_top_k

        def length(record: tokenprune.registry.Method) -> torch.Tensor:
            return record.hidden[:, record.num_prefix_tokens :].norm(dim=-1)

        return Method(name="by_norm", paper="none", schedule=Stages(rate), score=length, select=keep_top_k)

    try:
        model = timm.create_model("test_vit", pretrained=False).eval()
        tokenprune.patch(model, "by_norm", keep=0.5)
        assert tokenprune.report(model).to_dict()["method"] == "by_norm"
        assert model(torch.randn(1, 3, 160, 160)).shape == (1, 1000)
        assert "by_norm" in [info.name for info in tokenprune.methods()]
    finally:
        registry._METHODS.pop("by_norm")


def test_a_method_that_leaves_another_number_than_asked_is_refused() -> None:
    @register_method("keeps_more")
    def keeps_more(*, rate: float = 0.5) -> tokenprune.registry.Method:
        """One token more than asked."""
        from tokenprune.method import Method
        from tokenprune.schedule import Stages
        from tokenprune.selection.top_k import keep_top_k

        return Method(
            name="keeps_more",
            paper="none",
            schedule=Stages(rate),
            score=lambda record: record.hidden[:, record.num_prefix_tokens :].norm(dim=-1),
            select=lambda scores, record, keep: keep_top_k(scores, record, keep + 1),
        )

    try:
        with pytest.raises(tokenprune.UnsupportedMethod, match=r"keeps_more left \d+ tokens at blocks"):
            tokenprune.patch(timm.create_model("test_vit", pretrained=False).eval(), "keeps_more", keep=0.5)
    finally:
        registry._METHODS.pop("keeps_more")


def test_a_taken_name_is_refused() -> None:
    make_method("tome", {})
    with pytest.raises(tokenprune.UnsupportedMethod, match="registered already"):

        @register_method("tome")
        def tome() -> None:
            """Another one."""


def test_entry_points_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "their_method.py").write_text(
        textwrap.dedent(
            """
            import tokenprune
            from dataclasses import replace
            from tokenprune.registry import make_method

            @tokenprune.register_method("theirs")
            def theirs():
                \"\"\"Theirs.\"\"\"
                return replace(make_method("uniform", {}), name="theirs")
            """
        )
    )
    info = tmp_path / "their_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokenprune.methods]\ntheirs = their_method\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(0, {str(ROOT)!r});"
        " import tokenprune; print([m.name for m in tokenprune.methods()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "'theirs'" in done.stdout, done.stderr


def test_an_entry_point_that_fails_is_named_and_takes_no_other_method_with_it(tmp_path: Path) -> None:
    info = tmp_path / "broken_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokenprune.methods]\ntheirs = not_there\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(0, {str(ROOT)!r});"
        " import tokenprune; print([m.name for m in tokenprune.methods()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'tome'" in done.stdout
    assert "theirs = not_there" in done.stderr


def test_importing_is_lean() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tokenprune, torch;"
        # torch itself imports triton where it is installed
        " heavy = {'timm', 'transformers', 'diffusers', 'matplotlib', 'sklearn', 'datasets'};"
        " print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized(), sorted(tokenprune.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] False")
    for name in tokenprune.__all__:
        assert name in done.stdout
        assert getattr(tokenprune, name)
