"""The oracles of pitome, tofu and diffrate on numbers worked by hand."""

import math

import pytest
import torch
from constructed import constructed_place, patches
from naive_merges import MERGED, PRUNED, diffrate, elu, energies, pitome, pruned_share, tofu
from naive_vit import Place, Token

# Three keys that point the same way, one at a right angle, one the other way.
KEYS = [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]]


def test_energy_by_hand():
    # Cosines of token 0: 1, 0, 1, -1, 1; of token 1: 0, 1, 0, 0, 0; of token 3: -1, 0, -1, 1, -1. At a margin of 1/2
    # elu of these is .5, e^-.5 - 1, .5, e^-1.5 - 1, .5, and so on.
    near, aside, away = 0.5, math.exp(-0.5) - 1, math.exp(-1.5) - 1
    assert [elu(v) for v in (0.5, -0.5, -1.5)] == pytest.approx([near, aside, away])
    same, right, back = (3 * near + aside + away) / 5, (near + 4 * aside) / 5, (near + aside + 3 * away) / 5
    assert energies(KEYS, 0.5) == pytest.approx([same, right, same, back, same])
    assert same > right > back


def place_of(keep, block, keys=KEYS, **more):
    place = constructed_place(keep, keys=keys, **more)
    place.block = block
    return place


def test_pitome_late_protects_what_has_low_energy():
    # Order by energy: 0, 2, 4 (equal, the lower first), 1, 3. One goes: of 0 and 2 (A, B) the first into the second;
    # the others are protected. Block 8 of 12: the margin is .75 / 3.
    assert patches(pitome(place_of(4, 8))) == [(1,), (3,), (4,), (0, 2)]
    # Two go: A is 0 and 4, B is 2 and 1; both are as 2 is.
    assert patches(pitome(place_of(3, 8))) == [(3,), (1,), (0, 2, 4)]


def test_pitome_early_splits_all_tokens():
    # A is 0, 4, 3 and B is 2, 1 by rank; one goes, the most similar of 0 and 4 to 2, the lower.
    assert patches(pitome(place_of(4, 2))) == [(3,), (4,), (1,), (0, 2)]
    merged = pitome(place_of(4, 2, hidden=[1.0, 0.0, 4.0, 0.0, 0.0], members=[(0, 5), (1,), (2,), (3,), (4,)]))
    assert [token.hidden.item() for token in merged] == pytest.approx([0, 0, 0, (2 * 1 + 4) / 3])


def tofu_place(block):
    """Patch 3 goes to patch 0, as ToMe has it behind one prefix token."""
    hidden = [[3.0, 4.0], [1.0, 1.0], [0.0, 2.0], [0.0, 10.0]]
    tokens = [Token(torch.tensor(h, dtype=torch.float64), (j,), j) for j, h in enumerate(hidden)]
    keys = [[[0.0, 0.0], [1.0, 0.0], [3.0, 4.0], [0.0, 1.0], [2.0, 0.0]]]
    return Place(block, tokens, 1, True, [], keys, 3)


def test_tofu_by_hand():
    assert patches(tofu(tofu_place(5))) == [(1,), (0,), (2,)]  # one of the pair is gone
    late = tofu(tofu_place(6))
    assert patches(late) == [(1,), (0, 3), (2,)]
    # The mean of (3, 4) and (0, 10) is (1.5, 7), of length sqrt(51.25); the longer one has length 10.
    assert late[1].hidden.tolist() == pytest.approx([1.5 * 10 / math.sqrt(51.25), 7 * 10 / math.sqrt(51.25)])
    assert late[0].hidden.tolist() == [1, 1]


def test_the_published_rates_of_diffrate():
    assert len(PRUNED) == len(MERGED) == 12
    assert pruned_share(0) == 0.0
    assert pruned_share(1) == pytest.approx(1 / 3)  # 197 tokens, 196 behind pruning, 194 behind merging
    assert pruned_share(3) == pytest.approx(8 / 20)  # 176, 168, 156
    assert pruned_share(11) == 1.0


def test_diffrate_by_hand():
    # Class attention .3, .1, .25, .05, .2 of the patches; two of five stay: 0 and 2. Block 3 drops 8/20 of the three
    # that go, rounded 1: patch 3. Patches 4 and 1 are merged: into the one that points their way.
    attention = [[[0.1, 0.3, 0.1, 0.25, 0.05, 0.2], *[[0.2] * 6] * 5]]
    hidden = [[2.0, 0.0], [3.0, 4.0], [0.0, 1.0], [9.0, 9.0], [4.0, 0.0]]
    tokens = [Token(torch.tensor(h, dtype=torch.float64), (j,), j) for j, h in enumerate(hidden)]
    tokens[4].weight = 2.0
    left = diffrate(Place(3, tokens, 1, True, attention, [], 2))
    assert patches(left) == [(0, 4), (1, 2)]
    assert [token.hidden.tolist() for token in left] == [[3, 0], [1.5, 2.5]]
    # Patch 4 is parallel to patch 0: all of its 2 count; patch 1 has a cosine of 4/5 with patch 2.
    assert [token.weight for token in left] == pytest.approx([3.0, 1.8])
