"""The benchmark for a GPU: refused without one, and the same tables tried out on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenprune.evals import gpu_bench
from tokenprune.evals.kernel_cases import CASES
from tokenprune.evals.table import Table


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_bench.main(["--output", str(tmp_path)]) == 1
    assert "no CUDA GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(gpu_bench, "bench_kernels", short(gpu_bench.bench_kernels))
    table = gpu_bench.bench_gpu_kernels(cpu, dtypes=["float32", "bfloat16"], tokens=[16])
    assert {row["dtype"] for row in table.rows} == {"float32", "bfloat16"}
    assert {str(row["op"]).split(",")[0] for row in table.rows} >= set(CASES) | {"gather"}
    assert Table.from_json(table.to_json()).rows == table.rows

    calls = []
    monkeypatch.setattr(gpu_bench, "bench", lambda model, x, methods, **options: noted(calls, model, x, methods))
    table = gpu_bench.bench_gpu_models(cpu, model="vit_tiny_patch16_224", dtypes=["bfloat16"], sizes=[32])
    assert [row["kernels"] for row in table.rows] == ["default", "eager", "triton"]
    assert calls == [(torch.bfloat16, (16, 3, 32, 32), gpu_bench.METHODS)] * 3


def short(bench):  # type: ignore[no-untyped-def]
    return lambda **options: bench(**{**options, "sample_seconds": 0.0, "attempts": 1, "show_progress": False})


def noted(calls, model, x, methods):  # type: ignore[no-untyped-def]
    calls.append((next(model.parameters()).dtype, tuple(x.shape), methods))
    return Table([{"method": "top_k"}])
