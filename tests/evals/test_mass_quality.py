"""Measures of kept sets on known scores, and the tables on a small model."""

from __future__ import annotations

import pytest
import torch
from families import build, images

from tokenprune.evals.mass_quality import (
    COUNTS,
    PARTS,
    WINDOWS,
    iterations_table,
    overlap,
    probes_table,
    rank_correlation,
    records,
)


def test_overlap_and_rank_correlation_of_known_scores() -> None:
    exact = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert overlap(exact, exact) == rank_correlation(exact, exact) == 1
    assert overlap(-exact, exact) == 0
    assert rank_correlation(-exact, exact) == -1
    swapped = torch.tensor([[3.0, 1.0, 4.0, 2.0]])  # keeps the first and the third
    assert overlap(swapped, exact) == 0.5
    # Ranks 3, 1, 4, 2 against 4, 3, 2, 1: 1 - 6 (1 + 4 + 4 + 1) / (4 * 15).
    assert rank_correlation(swapped, exact) == pytest.approx(0)


def test_the_tables_of_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("class_token")
    shown = records(model, images(model))
    assert [record.place for record in shown] == list(range(4))
    monkeypatch.setitem(PARTS, "blocks 3 to 8", range(3, 4))
    monkeypatch.delitem(PARTS, "blocks 9 to 11")
    rows = iterations_table(shown).rows
    assert [row["iterations="] for row in rows[:6]] == ["1", "5", "30", "0.1", "0.01", "0.001"]
    for row in rows:
        assert 0 <= row["kept_alike"] <= 1
    first = {row["iterations="]: row for row in rows if row["depth"] == "blocks 0 to 2"}
    assert first["1"]["kept_alike"] <= first["5"]["kept_alike"] <= first["30"]["kept_alike"]
    assert 1 <= first["0.1"]["iterations"] <= first["0.01"]["iterations"] <= first["0.001"]["iterations"] <= 101
    assert len(probes_table(shown).rows) == len(COUNTS) * len(WINDOWS) * 2 * 2
