import pytest

from tokenprune.evals.plot import plot_accuracy_against_speed, plot_quality_against_flops, plot_training
from tokenprune.evals.stats import Interval
from tokenprune.evals.table import Table, interval_cells


@pytest.fixture
def table():
    def row(method, speed, top1, trusted=True):
        cells = interval_cells("speedup", Interval(speed, speed - 0.1, speed + 0.1))
        return {
            "method": method,
            **cells,
            **interval_cells("top1", Interval(top1, top1 - 0.02, top1 + 0.02)),
            "trusted": trusted,
        }

    rows = [row("unpatched", 1.0, 0.9), row("tome", 1.5, 0.88), row("tome", 1.9, 0.8, trusted=False)]
    return Table([*rows, row("random", 1.6, 0.6), {"method": "refused", "note": "why"}], {"device": "cpu"})


def test_svg_names_what_was_measured_and_nothing_else(table, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_accuracy_against_speed(table, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">{name}<" in drawn for name in ("unpatched", "tome", "random", "top1"))
    assert "refused" not in drawn


def test_png_is_written_without_touching_pyplot(table, tmp_path):
    import sys

    before = "matplotlib.pyplot" in sys.modules
    plot_accuracy_against_speed(table, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_training_curves_have_one_panel_a_model(tmp_path):
    import matplotlib

    log = [{"step": 10.0 * i, "canvas": 20 if i < 3 else 36, "loss": 1 / i, "validation": 1.1 / i} for i in range(1, 6)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_training({"dit": log, "unet": log[:3]}, tmp_path / "training.svg")
    drawn = (tmp_path / "training.svg").read_text()
    assert all(f">{name}<" in drawn for name in ("dit", "unet", "training", "step"))


def test_quality_over_flops_begins_where_it_is_told(tmp_path):
    import matplotlib

    rows = [{"method": f"m{i}", "flops_ratio": 0.5 + 0.01 * i, "kept": 0.9 - 0.01 * i} for i in range(12)]
    table = Table([*rows, {"method": "refused", "flops_ratio": None, "kept": None}])
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_quality_against_flops(table, tmp_path / "plot.svg", "kept", least=0.7, label="share kept")
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">{name}<" in drawn for name in (*(f"m{i}" for i in range(12)), "share kept", "0.700"))
    assert "refused" not in drawn
