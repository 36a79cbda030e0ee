"""The oracles of the clusterings on numbers worked by hand."""

import math

import pytest
from constructed import constructed_place, patches
from naive_clusters import assign, densities, distance, distances, dpc_knn, k_medoids, peaks, received

# Six tokens on a line: 0, 1, 3 and 10, 11, 14.
LINE = [0.0, 1.0, 3.0, 10.0, 11.0, 14.0]


def line_place(keep, column=(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)):
    total = sum(column)
    return constructed_place(keep, attention=[[[c / total for c in column]] * 6], hidden=LINE)


def test_distances_are_those_of_pairs():
    place = line_place(2)
    expected = [[distance(a, b) for b in place.tokens] for a in place.tokens]
    assert distances(place) == expected
    assert expected[1] == [1, 0, 2, 9, 10, 13]


def test_attention_received_is_that_of_all_queries():
    attention = [[[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.1, 0.1, 0.8]]]
    place = constructed_place(1, attention=attention, prefix=1, class_token=True)
    assert received(place) == pytest.approx([0.85, 1.55])


def test_a_centre_belongs_to_itself_and_ties_go_to_the_first():
    assert assign([[0, 1, 1], [1, 0, 1], [1, 1, 0]], [0, 1], []) == [0, 1, 0]
    assert assign([[0.0, 0.0], [0.0, 0.0]], [0, 1], []) == [0, 1]


def test_k_medoids_by_hand():
    # Weights 3, 2, 2, 1, 1, 1: the first centres are tokens 0 and 1 (the lower of the two that are equal).
    place = line_place(2, (3.0, 2.0, 2.0, 1.0, 1.0, 1.0))
    assert patches(k_medoids(place, iterations=0)) == [(0,), (1,)]
    # Nearest to token 0 is itself alone, all others to token 1. In that cluster the weighted costs (weights in tenths)
    # of tokens 1 to 5 are 2*2+9+10+13 = 36, 2*2+7+8+11 = 30, 2*9+2*7+1+4 = 37, 2*10+2*8+1+3 = 40, 2*13+2*11+4+3 = 55.
    assert patches(k_medoids(place, iterations=1)) == [(0,), (2,)]
    # Now tokens 0, 1 are nearest to 0 and 2 to 5 to token 2: costs of 0 and 1 are 2*1 and 3*1, of 2 to 5: 7+8+11 = 26,
    # 2*7+1+4 = 19, 2*8+1+3 = 20, 2*11+4+3 = 29. Token 3 it is.
    assert patches(k_medoids(place, iterations=2)) == [(0,), (3,)]
    # Then 0, 1, 2 and 3, 4, 5: costs 2*1+2*3 = 8, 3+2*2 = 7, 3*3+2*2 = 13 and 1+4 = 5, 1+3 = 4, 7.
    assert patches(k_medoids(place, iterations=3)) == [(1,), (4,)]


def test_dpc_knn_by_hand():
    # Two neighbours, a token itself and its nearest: mean squares 1/2, 1/2, 4/2, 1/2, 1/2, 9/2.
    apart = distances(line_place(2))
    density = densities(apart, 1, 2)
    assert density == pytest.approx([math.exp(-d) for d in (0.5, 0.5, 2.0, 0.5, 0.5, 4.5)])
    # Tokens 0, 1, 3, 4 are equally dense, and of these the lower counts as denser. Nearest denser: of 0 none, of 1
    # token 0 (1), of 2 token 1 (2), of 3 token 1 (9), of 4 token 3 (1), of 5 token 4 (3).
    # Scores: inf, 1 e^-.5 = .607, 2 e^-2 = .271, 9 e^-.5 = 5.46, .607, 3 e^-4.5 = .033.
    assert peaks(apart, density, 2, []) == [0, 3]
    assert peaks(apart, density, 3, []) == [0, 1, 3]
    place = line_place(2)
    merged = dpc_knn(place, neighbours=2)
    assert patches(merged) == [(0, 1, 2), (3, 4, 5)]
    assert [token.hidden.item() for token in merged] == pytest.approx([4 / 3, 35 / 3])
    assert [token.representative for token in merged] == [0, 3]


def test_dpc_knn_averages_what_enters_and_not_what_is_in_it():
    place = constructed_place(1, hidden=[0.0, 6.0], members=[(0, 2, 3), (1,)])
    assert [token.hidden.item() for token in dpc_knn(place)] == [3.0]
