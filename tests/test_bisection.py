"""The setting whose cost is nearest to what was asked for."""

from __future__ import annotations

import pytest

from tokenprune.bisection import nearest_to


@pytest.mark.parametrize("rising", [True, False])
def test_it_comes_near_from_either_side(rising: bool) -> None:
    settings: list[float] = []

    def tried(setting: float) -> tuple[float, float]:
        settings.append(setting)
        return (setting if rising else 4 - setting) ** 2 / 16, setting

    for aim in (0.1, 0.7):
        cost, setting = nearest_to(aim, tried, 0.0, 4.0, first=1.0, rising=rising, near=1e-4, rounds=30)
        assert cost == pytest.approx(aim, abs=1e-4)
        assert setting == pytest.approx(4 * aim**0.5 if rising else 4 - 4 * aim**0.5, abs=1e-2)
        assert settings[0] == 1.0
        assert len(settings) < 30
        settings.clear()


def test_the_nearest_is_not_the_last_where_costs_jump() -> None:
    costs = {0.5: 0.52, 0.25: 0.1, 0.375: 0.2, 0.4375: 0.3}
    for rounds in (1, 4):
        assert nearest_to(
            0.5, lambda s: (costs[s], f"at {s}"), 0.0, 1.0, first=0.5, rising=True, near=0.001, rounds=rounds
        ) == (0.52, "at 0.5")
    assert nearest_to(0.5, lambda s: (0.9, s), 0.0, 1.0, first=0.5, rising=True, near=0.001, rounds=0) == (0.9, 0.5)
