"""Noise of five colours: what its neighbours have in common, and that no place of the grid is favoured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedModel
from tokenprune.scores.drawn import COLORS, colored_noise, drawn
from tokenprune.selection.top_k import keep_top_k

torch.set_num_threads(1)
GRID = (9, 13)


def record(batch: int, grid: tuple[int, int] | None = GRID) -> AttentionRecord:
    origin = torch.arange(GRID[0] * GRID[1]).expand(batch, -1)
    return AttentionRecord(torch.zeros(batch, origin.shape[1], 1), origin, 0, 0, 1, grid, has_class_token=False)


def correlation(x: Tensor, distance: int) -> float:
    first, second = x[:, :, :-distance].flatten(), x[:, :, distance:].flatten()
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def test_neighbours() -> None:
    torch.manual_seed(0)
    noise = {c: colored_noise(400, (16, 16), c, 1.0, torch.device("cpu")) for c in COLORS if c != "white"}
    assert correlation(noise["red"], 1) == pytest.approx(0.78, abs=0.03)  # exp(-1/4) of an ideal Gaussian
    assert correlation(noise["blue"], 1) < -0.1
    assert correlation(noise["green"], 1) > 0.5
    assert correlation(noise["green"], 4) < -0.1  # a band: it comes back
    assert abs(correlation(noise["purple"], 4)) < 0.1
    for one in noise.values():
        assert float(one.mean().abs()) < 0.05


@pytest.mark.parametrize("color", COLORS)
def test_no_place_is_favoured_and_no_image_like_another(color: str) -> None:
    torch.manual_seed(1)
    scores = drawn(record(3000), color=color)  # type: ignore[arg-type]
    kept = keep_top_k(scores, record(3000), 29).kept
    assert kept.shape == (3000, 29)
    assert len(set(map(tuple, kept[:50].tolist()))) == 50
    counts = torch.bincount(kept.flatten(), minlength=117) / 3000
    share, spread = 29 / 117, (29 / 117 * (1 - 29 / 117) / 3000) ** 0.5
    assert float((counts - share).abs().max()) < 5 * spread


def test_a_grid_is_needed_for_all_but_white_noise() -> None:
    assert drawn(record(2, None)).shape == (2, 117)
    with pytest.raises(UnsupportedModel, match="color='white'"):
        drawn(record(2, None), color="green")
