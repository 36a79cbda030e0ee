"""The rows and tables of docs/quality.md, on a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals import quality_table
from tokenprune.evals.arms import SMALLER_INPUT
from tokenprune.evals.data import open_data
from tokenprune.evals.models import LoadedModel
from tokenprune.evals.quality_rows import Bench, Task, open_bench, quality_arm, quality_cases
from tokenprune.evals.quality_table import pivot, rounded, write_tables
from tokenprune.evals.stats import Interval
from tokenprune.evals.table import Row, Table, interval_cells

TASK = Task("small", "top1_kept", "share", 0.5, 6, 10)
DENSE = Task("small", "saliency", "correlation", 0.5, 6, 10, dense=True)


def tokens_map(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.forward_features(images)[:, 1:].norm(dim=-1).view(len(images), 1, images.shape[-2] // 16, -1)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=96, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return LoadedModel("small", model, lambda picture: picture, (0.0,) * 3, (1.0,) * 3, saliency=tokens_map)


@pytest.fixture(scope="module")
def pictures(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    images = nn.functional.interpolate(images, 96) + 0.1 * torch.randn(24, 3, 96, 96)
    with torch.no_grad():
        labels = loaded.model(images).argmax(1)
    labels[::4] = (labels[::4] + 1) % 10
    return images, labels


@pytest.fixture(scope="module")
def bench(loaded: LoadedModel, pictures: tuple[torch.Tensor, torch.Tensor]) -> Bench:
    return open_bench(TASK, loaded, open_data(pictures), open_data(pictures[0]), samples=None, seed=0)


@pytest.fixture(scope="module")
def dense(loaded: LoadedModel, pictures: tuple[torch.Tensor, torch.Tensor]) -> Bench:
    return open_bench(DENSE, loaded, open_data(pictures[0]), open_data(pictures[0]), samples=None, seed=0)


def row_of(bench: Bench, method: str, flops: float) -> Row:
    [_, case] = quality_cases(bench, [method], [flops])
    [row] = case.run()
    return case.labels | row


def test_a_score_whose_interval_is_not_known_is_shown_alone() -> None:
    row: Row = {"method": "uniform", "flops": 0.6, "flops_ratio": 0.6, "note": None, "kept": 2 / 3, "kept_low": None}
    assert "| `uniform` | 0.667 |" in pivot(Table([row], {}), "kept")


def test_a_row_is_what_a_loop_over_the_images_gives(bench, loaded, pictures) -> None:
    images, labels = pictures
    row = row_of(bench, "top_k", 0.6)
    with tokenprune.patched(loaded.model, "top_k", flops=0.6), torch.no_grad():
        right = loaded.model(images).argmax(1) == labels
        cost = tokenprune.report(loaded.model).to_dict()["flops_ratio"]
    with torch.no_grad():
        unpatched = loaded.model(images).argmax(1) == labels
    assert int(right.sum()) != int(unpatched.sum()), "the budget must change some answer"
    assert row["top1_kept"] == pytest.approx(int(right.sum()) / int(unpatched.sum()))
    assert row["top1_kept_low"] < row["top1_kept"] < row["top1_kept_high"]
    assert (row["method"], row["flops"], row["flops_ratio"]) == ("top_k", 0.6, pytest.approx(cost))


def test_the_first_row_is_the_unpatched_model(bench) -> None:
    case, *others = quality_cases(bench, None, [0.6])
    [row] = case.run()
    assert case.labels == {"method": "unpatched", "flops": 1.0}
    assert row["top1"] == pytest.approx(0.75)
    assert row["top1_kept"] == 1.0
    assert {"tome", "ats", "saint", "random", SMALLER_INPUT} < {other.labels["method"] for other in others}


@pytest.mark.parametrize("task", ["bench", "dense"])
def test_a_threshold_meets_the_budget_in_the_mean(task: str, request: pytest.FixtureRequest) -> None:
    bench = request.getfixturevalue(task)
    arm = quality_arm(bench, "adaptive_tome", 0.7)
    total = 0.0
    for image in bench.calibration:
        with torch.no_grad():
            arm.model.forward_features(image[None]) if bench.task.dense else arm.model(image[None])
        total += tokenprune.report(arm.model).to_dict()["flops_ratio"]
    assert total / len(bench.calibration) == pytest.approx(0.7, abs=0.01)
    assert arm.note.startswith("threshold=0.")
    assert arm.note.endswith("found on 6 images without labels")


def test_a_dense_output_is_of_the_whole_last_block(dense, loaded, pictures) -> None:
    left = []
    for prefix_only_last in (True, False):
        with tokenprune.patched(loaded.model, "top_k", flops=0.7, prefix_only_last=prefix_only_last), torch.no_grad():
            loaded.model(pictures[0])
            left.append(tokenprune.report(loaded.model).to_dict()["places"][-1]["tokens_out"])
    assert left[0] > left[1]
    assert row_of(dense, "top_k", 0.7)["tokens"] == left[1]


def test_without_a_threshold_the_bound_on_what_is_kept_meets_it(bench) -> None:
    least = row_of(bench, "ats", 0.9)
    assert "top1" not in least
    assert "keeps so few by itself" in least["note"]
    most = float(least["note"].rsplit(maxsplit=1)[1])
    arm = quality_arm(bench, "ats", round(most - 0.08, 2))
    with torch.no_grad():
        arm.model(bench.calibration)
    cost = tokenprune.report(arm.model).to_dict()["flops_ratio"]
    assert cost == pytest.approx(most - 0.08, abs=0.016)
    assert arm.note.startswith("keep=")


def test_what_cannot_be_met_says_why(bench) -> None:
    for method in ("top_k", "saint"):
        row = row_of(bench, method, 0.05)
        assert "flops=0.05" in row["note"]
        assert "top1_kept" not in row


def test_a_smaller_input_is_a_row(bench, dense) -> None:
    assert row_of(bench, SMALLER_INPUT, 0.7)["note"] == "80x80 pixels"
    assert -1 < row_of(dense, SMALLER_INPUT, 0.7)["saliency"] < 1


def row(method: str, flops: float, kept: float | None, ratio: float | None = None, note: str | None = None) -> Row:
    cells: Row = {"method": method, "flops": flops, "flops_ratio": ratio or flops, "note": note}
    return (
        cells if kept is None else cells | interval_cells("top1_kept", Interval(kept, kept - 0.01234567, kept + 0.02))
    )


TABLE = Table(
    [
        row("unpatched", 1.0, 1.0),
        row("random", 0.5, 0.7),
        row("tome", 0.5, 0.9),
        row("tome", 0.8, 0.99),
        row("random", 0.8, 0.95, ratio=0.83),
        row("diffrate", 0.8, 0.98),
        row("diffrate", 0.5, None, note="0.7 is the least"),
    ],
    {"images": 7},
)


def test_the_table_has_a_line_for_each_method_and_reasons_below() -> None:
    assert pivot(TABLE, "top1_kept").splitlines() == [
        "| method | 0.8 | 0.5 |",
        "| --- | --- | --- |",
        "| `tome` | 0.990 [0.978, 1.010] | 0.900 [0.888, 0.920] |",
        "| `random` | 0.950 [0.938, 0.970] at 0.83 | 0.700 [0.688, 0.720] |",
        "| `diffrate` | 0.980 [0.968, 1.000] | none |",
        "",
        "- `diffrate` at 0.5: 0.7 is the least",
    ]


def test_the_stored_file_is_small_and_plain(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "digits.json")
    write_tables(tmp_path)
    stored = json.loads((tmp_path / "quality.json").read_text())
    assert list(stored) == ["digits"]
    assert stored["digits"]["model"] == "digits-vit"
    assert stored["digits"]["measure"] == "top1_kept"
    assert stored["digits"]["rows"][2] == {
        "method": "tome",
        "flops": 0.5,
        "flops_ratio": 0.5,
        "top1_kept": 0.9,
        "top1_kept_low": 0.8877,
        "top1_kept_high": 0.92,
    }
    assert rounded(TABLE)["rows"] == stored["digits"]["rows"]
    assert "| `tome` |" in (tmp_path / "quality.md").read_text()
    assert (tmp_path / "quality-digits.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_where_it_was(bench, tmp_path, monkeypatch) -> None:
    asked: list[tuple[str, float]] = []

    def counted(bench: Bench, name: str, flops: float, real=quality_arm):  # type: ignore[no-untyped-def]
        asked.append((name, flops))
        return real(bench, name, flops)

    monkeypatch.setitem(quality_cases.__globals__, "quality_arm", counted)
    monkeypatch.setattr(quality_table, "bench_of", lambda *_: bench)
    common = ["digits", "--output", str(tmp_path), "--threads", str(torch.get_num_threads())]
    assert quality_table.main([*common, "--method", "random", "--flops", "0.6"]) == 0
    assert (
        quality_table.main([*common, "--method", "random", "--method", "uniform", "--flops", "0.6", "--flops", "0.8"])
        == 0
    )
    assert asked == [("random", 0.6), ("uniform", 0.6), ("random", 0.8), ("uniform", 0.8)]
    rows = json.loads((tmp_path / "digits.json").read_text())["rows"]
    assert [(line["method"], line["flops"]) for line in rows] == [("unpatched", 1.0), *asked]

    stored = Table.from_json((tmp_path / "digits.json").read_text())
    stored.environment["images"] = 5
    stored.save(tmp_path / "digits.json")
    with pytest.raises(TokenPruneError, match="measured with images 5, and not 24"):
        quality_table.main(common)
