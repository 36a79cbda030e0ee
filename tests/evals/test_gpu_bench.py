"""The benchmark for a GPU: refused without one, and the same rows tried out on a CPU with small models."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals import dinov2_speed, gpu_bench, gpu_denoisers, gpu_lvlm, gpu_vits
from tokenprune.evals.cases import Case, run_cases
from tokenprune.evals.gpu_denoisers import Denoiser, way
from tokenprune.evals.kernel_cases import CASES
from tokenprune.evals.real_denoisers import created_on, first_steps, later_steps
from tokenprune.evals.region_speed import square
from tokenprune.evals.stats import Interval
from tokenprune.evals.table import Table
from tokenprune.evals.throughput import Timing, measure

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_bench.main(["--output", str(tmp_path)]) == 1
    assert "no CUDA GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu_bench.main(["--tables", "vits,vit"])
    assert "there is no vit; there are kernels, vits, denoisers, lvlm, compiled" in capsys.readouterr().err


def test_what_is_measured_is_stored_before_the_next_row_is_begun(tmp_path: Path) -> None:
    stored, now = [], iter(range(100))

    def run(name: str) -> list[dict[str, Any]]:
        path = tmp_path / "table.json"
        stored.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        if name == "b":
            raise RuntimeError("out of\nmemory")
        return [{"ms": 1.0}, {"ms": 2.0}]

    cases = [Case({"case": name}, partial(run, name)) for name in "abcd"]
    # The clock is read at the start, before each case and behind each that was run.
    table = run_cases(cases, {}, tmp_path / "table", seconds=7, clock=lambda: float(next(now)))
    assert stored == [0, 2, 3]
    assert table.rows == [
        {"case": "a", "ms": 1.0},
        {"case": "a", "ms": 2.0},
        {"case": "b", "note": "RuntimeError: out of memory"},
        {"case": "c", "ms": 1.0},
        {"case": "c", "ms": 2.0},
        {"case": "d", "note": "not begun: the 7 s of this table were over"},
    ]
    assert "out of memory" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == table.rows


def test_what_is_stored_is_not_measured_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(name: str) -> list[dict[str, Any]]:
        ran.append(name)
        return [{"ms": len(ran)}]

    def cases(names: str) -> list[Case]:
        return [Case({"case": name}, partial(run, name)) for name in names]

    run_cases(cases("ab"), {"device": "one"}, tmp_path / "table", resume=True)
    table = run_cases(cases("abc"), {"device": "one"}, tmp_path / "table", resume=True)
    assert ran == ["a", "b", "c"]
    assert [row["ms"] for row in table.rows] == [1, 2, 3]
    table = run_cases(cases("abcde"), {"device": "one"}, tmp_path / "table", resume=True, seconds=0)
    assert len(table.rows) == 3
    with pytest.raises(TokenPruneError, match="measured with device one, and not two"):
        run_cases(cases("abc"), {"device": "two"}, tmp_path / "table", resume=True)
    assert len(run_cases(cases("a"), {"device": "two"}, tmp_path / "table").rows) == 1


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_bench, "run_cases", partial(noted, seen := []))
    monkeypatch.setattr(gpu_bench, "conditions", lambda device: {})
    options = ["--tables", "denoisers,vits", "--output", str(tmp_path), "--limit-seconds", "5", "--dtype", "float16"]
    assert gpu_bench.main([*options, "--only", "FLUX", "--only", "at_edm"]) == 0
    assert seen == [("gpu-denoisers", 5.0, [("FLUX.1-dev", "float16", "at_edm")]), ("gpu-vits", 5.0, [])]


def noted(seen, cases, environment, path, *, seconds):  # type: ignore[no-untyped-def]
    keys = ("model", "dtype", "method")
    seen.append((path.name, seconds, [tuple(case.labels[key] for key in keys) for case in cases]))
    return Table([])


def test_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    short = partial(gpu_bench.bench_kernels, sample_seconds=0.0, attempts=1)
    monkeypatch.setattr(gpu_bench, "bench_kernels", short)
    cases = list(gpu_bench.kernel_cases(CPU, [torch.bfloat16, torch.float32], tokens=[16]))
    assert {(case.labels["dtype"], case.labels["op"]) for case in cases} == {
        (dtype, operation) for dtype in ("bfloat16", "float32") for operation in CASES
    }
    rows = [{**case.labels, **row} for case in cases[: len(CASES)] for row in case.run()]
    assert {str(row["op"]).split(",")[0] for row in rows} >= set(CASES) | {"gather"}


def test_vision_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = gpu_vits.Vit("vit_tiny_patch16_224", 64, (1, 2), ("default", "eager"))
    monkeypatch.setattr(gpu_vits, "VITS", (vit,))
    monkeypatch.setattr(gpu_vits, "METHODS", ("top_k",))
    bench = importlib.import_module("tokenprune.evals.bench")  # the package has a function of that name
    monkeypatch.setattr(bench, "measure", partial(measure, sample_seconds=0.0))
    cases = list(gpu_vits.vit_cases(CPU, [torch.bfloat16]))
    assert [(case.labels["batch"], case.labels["kernels"]) for case in cases] == [
        (1, "default"), (1, "eager"), (2, "default"), (2, "eager")
    ]  # fmt: skip
    for row in [{**case.labels, **row} for case in cases[1:3] for row in case.run()]:
        assert (row["method"], row["dtype"], row["pixels"]) == ("top_k", "bfloat16", 64)
        assert row["flops_ratio"] == pytest.approx(0.6, abs=0.05)
        assert row["speedup"] > 0


def test_compiled_vision_transformers_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[bool, str]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *, fullgraph, mode: compiled.append((fullgraph, mode)))
    monkeypatch.setattr(gpu_vits, "COMPILED", (gpu_vits.Vit("vit_tiny_patch16_224", 32, (1,)),))
    monkeypatch.setattr(gpu_vits, "METHODS", ("tome",))
    monkeypatch.setattr(dinov2_speed, "measure", partial(measure, sample_seconds=0.0))
    cases = list(gpu_vits.compiled_vit_cases(CPU, [torch.float32]))
    rows = [{**case.labels, **row} for case in cases for row in case.run()]
    assert compiled == [(True, mode) for mode in ("reduce-overhead", "default") for _ in range(3)]
    assert [(row["method"], row["batch"], row["compiled"]) for row in rows] == [
        ("tome", 1, "reduce-overhead"),
        ("tome", 1, "default"),
    ]
    assert all(row["images_per_s"] > 0 for row in rows)


def tiny_pixart(pixels: int, batch: int) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=8,
        sample_size=pixels // 8, patch_size=2, cross_attention_dim=32, caption_channels=16,
        use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, pixels // 8, pixels // 8).repeat(batch, 1, 1, 1),
        "encoder_hidden_states": torch.randn(batch, 5, 16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


WAYS = (
    *gpu_denoisers.at_budget(0.7),
    gpu_denoisers.FIRST_OF_REGION,
    way("tomesd", ratio=0.5, merge_crossattn=True, merge_mlp=True),
)
TINY = Denoiser(tiny_pixart, 256, 2, WAYS)


def called_once(*arms: Any, device: torch.device, **options: Any) -> Timing:
    for arm in arms:
        arm()
    return Timing(20, 1, 1.0, 0.5, Interval(2.0, 2.0, 2.0), 1.0, True, 1, None, None)


def multiply_adds(call: Any) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(
            one,
            id=f"{one.method} {'first' if one.first else one.label}",
            marks=[pytest.mark.full] if one.method in ("uniform", "tomesd") else [],
        )
        for one in WAYS
    ],
)
def test_a_denoiser_row_promises_what_its_step_costs(one: gpu_denoisers.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_denoisers, "measure", called_once)
    monkeypatch.setattr(gpu_denoisers, "DENOISERS", {"tiny": TINY})
    (case,) = [
        case
        for case, other in zip(gpu_denoisers.denoiser_cases(CPU, torch.float32, attempts=1), WAYS, strict=True)
        if other is one
    ]
    (row,) = case.run()
    model, inputs = tiny_pixart(256, 2)
    drive = first_steps if one.first else later_steps
    whole = multiply_adds(drive(model, inputs))
    call = drive(tokenprune.patch(model, one.method, **one.options), inputs)
    call()  # solves the budget, and is the first step of a run
    assert row["promised"] == pytest.approx(whole / multiply_adds(call), rel=0.02)
    assert (row["promised"] > 1.2) != one.first
    assert (row["ms"], row["unpatched_ms"], row["trusted"]) == (500.0, 1000.0, True)
    assert case.labels["budget"] == ("mask=0.25" if one.method == "region" else one.label)


@pytest.mark.parametrize("method", ["at_edm", "region"])
def test_every_call_is_a_step_of_its_own(method: str) -> None:
    model, inputs = tiny_pixart(256, 2)
    options = {"mask": square(32, 0.25), "dense_steps": (0,)} if method == "region" else {"keep": 0.5, "steps": {}}
    tokenprune.patch(model, method, **options)
    for drive, computed in ((later_steps, [1, 1, 1]), (first_steps, [0, 0, 0] if method == "region" else [1, 1, 1])):
        call = drive(model, inputs)
        call()
        with tokenprune.record(model) as recorded:
            for _ in range(3):
                call()
        assert len(recorded.forwards) == 3
        assert [min(1, len(forward.places)) for forward in recorded.forwards] == computed
        steps = [forward.timestep for forward in recorded.forwards]
        assert steps == sorted(steps, reverse=True)
        assert len(set(steps)) == (3 if drive is later_steps else 1)


def test_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import PixArtTransformer2DModel

    compiled: list[bool] = []
    monkeypatch.setattr(
        PixArtTransformer2DModel, "compile_repeated_blocks", lambda model, *, fullgraph: compiled.append(fullgraph)
    )
    monkeypatch.setattr(gpu_denoisers, "DENOISERS", {"tiny": TINY})
    monkeypatch.setattr(gpu_denoisers, "COMPILED", {"tiny": "at_edm"})
    monkeypatch.setattr(gpu_denoisers, "measure", partial(measure, sample_seconds=0.0))
    (case,) = gpu_denoisers.compiled_denoiser_cases(CPU, torch.float32)
    (row,) = case.run()
    assert compiled == [True] * 3
    assert row["promised"] == pytest.approx(1 / 0.7, rel=0.02)
    assert row["ms"] > 0
    assert case.labels["compiled"] == "blocks"


def test_a_llava(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"layers": 4, "width": 64, "head_width": 32, "intermediate": 96, "tower_layers": 3, "tower_width": 128}
    monkeypatch.setattr(gpu_lvlm, "SHAPE", {**small, "image": 112})
    monkeypatch.setattr(gpu_lvlm, "METHODS", ("top_k", "fastv"))
    monkeypatch.setattr(gpu_lvlm, "TOKENS", 7)
    cases = list(gpu_lvlm.lvlm_cases(CPU, torch.bfloat16, attempts=1))
    rows = [{**case.labels, **row} for case in cases for row in case.run()]
    assert [(row["measurement"], row["method"]) for row in rows] == [
        ("top_k", "unpatched"), ("top_k", "top_k"), ("fastv", "unpatched"), ("fastv", "fastv")
    ]  # fmt: skip
    for row in rows[1::2]:
        assert row["as_counted"]  # two bytes a number
        assert row["speedup"] > 0
        assert isinstance(row["trusted"], bool)


def test_models_are_made_in_their_dtype() -> None:
    with created_on("meta", torch.bfloat16):
        layer = nn.Linear(2, 3)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"


def test_real_sizes() -> None:
    """Parameters in billions, as published."""
    published = {"SDXL": 2.57, "FLUX.1-dev": 11.9, "SD 1.5": 0.86, "SD3 medium": 2.03, "PixArt XL/2": 0.61}
    for name, billions in published.items():
        denoiser = gpu_denoisers.DENOISERS[name]
        with created_on("meta", torch.bfloat16):
            model, inputs = denoiser.make(denoiser.pixels, denoiser.batch)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)
        assert inputs["encoder_hidden_states"].shape[0] == denoiser.batch
