"""The oracles of saint and algm on numbers worked by hand."""

import math

import pytest
import torch
from constructed import constructed_place, patches
from naive_adaptive import algm, merge_alike, pool_windows, saint
from naive_vit import Place, Token


def unit(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def test_saint_by_hand():
    # Candidates 0, 2, 4 at 0, 90 and 20 degrees; the others 1, 3, 5 at 10, 100 and 15. Within 30 degrees (a cosine of
    # .866) candidate 0 has two (10, 15), candidate 2 one (100), candidate 4 two (10, 15).
    keys = [unit(d) for d in (0, 10, 90, 100, 20, 15)]
    near = math.cos(math.radians(30))

    def kept(keep=6, **options):
        return patches(saint(constructed_place(keep, keys=keys), threshold=near, **options))

    assert kept(neighbours=3) == [(0,), (1,), (2,), (3,), (4,), (5,)]
    assert kept(neighbours=2) == [(1,), (2,), (3,), (5,)]
    # One has three: none; a bound of five takes the one of the highest score, twice exp(10 (mean - .866)): candidate 4,
    # at 10 and 5 degrees from its neighbours, where candidate 0 is at 10 and 15.
    assert kept(5, neighbours=3) == [(0,), (1,), (2,), (3,), (5,)]
    assert patches(saint(constructed_place(1, keys=[[1.0]]))) == [(0,)]


def test_a_score_weighs_count_and_likeness():
    # Candidate 0 has two neighbours at 25 degrees, candidate 2 one at 1 degree: 2 exp(10 (.9063 - .866)) = 2.99 against
    # exp(10 (.99985 - .866)) = 3.81; with gamma 0 it is 2 against 1.
    keys = [unit(d) for d in (0, 25, 180, -25, 400, 179)]
    near = math.cos(math.radians(30))
    place = [constructed_place(5, keys=keys) for _ in range(2)]
    assert (2,) not in patches(saint(place[0], threshold=near, neighbours=9))
    assert (0,) not in patches(saint(place[1], threshold=near, neighbours=9, gamma=0.0))


def grid_place(degrees, keep, block=0, prefix=0):
    tokens = [Token(torch.tensor(unit(d), dtype=torch.float64), (j,), j) for j, d in enumerate(degrees)]
    return Place(block, tokens, prefix, False, [], [], keep)


def test_algm_pools_windows_by_hand():
    # 3 x 4 tokens: two whole windows, 0 1 4 5 and 2 3 6 7, and a row that is in none.
    degrees = [0, 10, 0, 60, 0, 10, 60, 0, 0, 0, 0, 0]
    # Pairs of the first: 10, 0, 10, 10, 0, 10 degrees: (4 cos 10 + 2) / 6 = .9899; of the second (4 cos 60 + 2) / 6 =
    # 2/3.
    left = pool_windows(grid_place(degrees, 12), 0.88, (3, 4))
    assert patches(left) == [(2,), (3,), (0, 1, 4, 5), (6,), (7,), (8,), (9,), (10,), (11,)]
    assert left[2].representative == 5
    c, s = unit(10)
    assert left[2].hidden.tolist() == pytest.approx([(1 + c) / 2, s / 2])
    assert len(pool_windows(grid_place(degrees, 12), 0.5, (3, 4))) == 6
    assert len(pool_windows(grid_place(degrees, 7), 0.88, (3, 4))) == 6  # a bound takes the next, whole
    assert len(algm(grid_place(degrees, 12), grid=(3, 4))) == 9


def test_algm_merges_pairs_by_hand():
    # Without a prefix A is 0, 2, 4 at 0, 90, 180 degrees, B is 1, 3, 5 at 5, 120, 190. Best cosines: cos 5 = .9962 (to
    # 1), cos 30 = .8660 (to 3), cos 10 = .9848 (to 5): mean .9490, deviation .0721. In layer 5 the threshold is .9634.
    degrees = [0, 5, 90, 120, 180, 190]
    assert patches(merge_alike(grid_place(degrees, 6, block=4))) == [(0, 1), (2,), (3,), (4, 5)]
    # In the first layer it is 1.021: none, until a bound takes the best.
    assert len(merge_alike(grid_place(degrees, 6, block=0))) == 6
    assert patches(merge_alike(grid_place(degrees, 5, block=0))) == [(0, 1), (2,), (3,), (4,), (5,)]
    # Behind one prefix token the sides swap: 5 to 4 (10 degrees), 1 to 0 (5 degrees), 3 to 2 (30).
    assert patches(merge_alike(grid_place(degrees, 6, block=4, prefix=1))) == [(0, 1), (2,), (3,), (4, 5)]
    assert merge_alike(grid_place(degrees, 6, block=4, prefix=1))[0].representative == 0
