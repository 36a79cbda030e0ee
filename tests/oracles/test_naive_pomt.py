"""The oracle of pomt on numbers worked by hand."""

import math

import pytest
from constructed import constructed_place, patches
from naive_pomt import best_count, pomt, scores_of

# A class token and three patches, two heads; rows are queries.
ATTENTION = [
    [[0.0, 1.0, 0.0, 0.0], [0.0, 0.4, 0.4, 0.2], [0.0, 0.2, 0.5, 0.3], [0.0, 0.1, 0.6, 0.3]],
    [[0.0, 0.0, 0.0, 1.0], [0.0, 0.6, 0.2, 0.2], [0.0, 0.2, 0.2, 0.6], [0.0, 0.3, 0.3, 0.4]],
]
# Two channels: of the heads the larger in each is (0, 0), (1, 2), (0, 0), (1, 0).
VALUES = [
    [[0.0, 0.0], [1.0, 0.0], [0.0, -1.0], [1.0, -5.0]],
    [[-9.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, 0.0]],
]


def place(keep):
    made = constructed_place(keep, attention=ATTENTION, hidden=[1.0, 20.0, 4.0], prefix=1, class_token=True)
    made.values = VALUES
    return made


def test_scores_by_hand():
    # The class token's row does not count. Largest of both heads: rows .6 .4 .2, .2 .5 .6, .3 .6 .4, columns 1.1, 1.5
    # and 1.2. Sums over channels 0, 3, 0, 1: exponents 1, e^3, 1, e.
    total = 2 + math.exp(3) + math.e
    expected = [1.1 / 1.5 + math.exp(3) / total, 1 + 1 / total, 1.2 / 1.5 + math.e / total]
    assert scores_of(place(2)) == pytest.approx(expected)


def test_one_more_token_is_the_mean_of_the_others():
    left = pomt(place(2))
    assert patches(left) == [(0,), (1, 2)]
    assert [token.hidden.item() for token in left] == [1, 12]
    assert patches(pomt(place(1))) == [(0, 1, 2)]


def test_utility_by_hand():
    # Times 4, 2, 1 and qualities 1, .9, .5: at alpha 1/2 utilities .5, .7, .625; at 0.9 the fastest has 0.725.
    assert best_count([9, 6, 3], [4.0, 2.0, 1.0], [1.0, 0.9, 0.5], 0.5) == 6
    assert best_count([9, 6, 3], [4.0, 2.0, 1.0], [1.0, 0.9, 0.5], 0.9) == 3
    assert best_count([9, 6, 3], [4.0, 2.0, 1.0], [1.0, 0.9, 0.5], 0.0) == 9
