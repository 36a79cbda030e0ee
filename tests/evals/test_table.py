import csv
import io
import json

import pytest
import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.stats import Interval
from tokenprune.evals.table import Table, environment, interval_cells


@pytest.fixture
def table():
    return Table(
        rows=[
            {
                "method": "tome",
                "batch": 8,
                **interval_cells("speedup", Interval(1.5, 1.4, 1.6)),
                "trusted": True,
                "note": None,
            },
            {"method": 'odd, "name" | pipe', "batch": None, "speedup": float("nan"), "note": "line one"},
        ],
        environment={"device": "cpu", "threads": 2},
    )


def test_json_round_trip(table):
    again = Table.from_json(table.to_json())
    assert again.rows[0] == table.rows[0]
    assert again.rows[1]["speedup"] is None
    assert again.environment == table.environment
    assert "NaN" not in table.to_json()
    assert Table.from_json(again.to_json()) == again


def test_csv_round_trip(table):
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["method"] for row in rows] == ["tome", 'odd, "name" | pipe']
    assert [float(rows[0][name]) for name in ("speedup", "speedup_low", "speedup_high")] == [1.5, 1.4, 1.6]
    assert rows[1]["batch"] == rows[1]["speedup_low"] == rows[1]["speedup"] == ""
    assert [row["threads"] for row in rows] == ["2", "2"]


def test_markdown_shows_intervals_and_escapes_pipes(table):
    lines = table.to_markdown().splitlines()
    assert lines[0] == "| method | batch | speedup | trusted | note |"
    assert lines[2] == "| tome | 8 | 1.500 [1.400, 1.600] | yes |  |"
    assert "\\|" in lines[3]
    assert lines[-1] == "device cpu, threads 2"


def test_text_is_aligned_and_leaves_out_empty_columns():
    text = Table([{"a": "x", "b": 1, "c": None}, {"a": "long name", "b": 22, "c": None}]).to_text().splitlines()
    assert text[:3] == ["a          b", "x          1", "long name  22"]


@pytest.mark.parametrize(
    ("suffix", "start"), [(".json", "{"), (".csv", "method,"), (".md", "| method"), (".txt", "method")]
)
def test_save_follows_the_suffix(table, tmp_path, suffix, start):
    table.save(tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").read_text().startswith(start)


def test_save_refuses_another_suffix(table, tmp_path):
    with pytest.raises(TokenPruneError, match=r"\.xlsx.*\.json"):
        table.save(tmp_path / "out.xlsx")


def test_environment_names_the_conditions():
    found = environment("cpu", torch.bfloat16)
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["dtype"] == "bfloat16"
    assert "multiply-adds" in str(found["unit"])
    json.dumps(found)
