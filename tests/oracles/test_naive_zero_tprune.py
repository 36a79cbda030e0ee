"""The oracle of zero_tprune: one example worked by hand, and each of its parts changing what is kept."""

import math

import pytest
import torch
from constructed import constructed_place, patches, same_rows
from naive_zero_tprune import (
    closeness,
    feature_of,
    fuse_heads,
    head_variance,
    pagerank,
    paper_iterations,
    partners,
    passing_heads,
    similar_tokens,
    start_scores,
    zero_tprune,
)

# One head, a class token and three patches. Rows are queries.
HAND = [
    [0, 1 / 2, 1 / 4, 1 / 4],
    [1 / 2, 0, 1 / 2, 0],
    [0, 1 / 2, 0, 1 / 2],
    [1 / 4, 1 / 4, 1 / 4, 1 / 4],
]
OFF = (0.0, math.inf)


def kept(place, **options):
    return [members[0] for members in patches(zero_tprune(place, **options))]


def test_weighted_pagerank_by_hand():
    # N = 4, so the class token starts with sqrt(4) = 2 times as much: (2, 1, 1, 1) / 5.
    start = start_scores(4, class_token=True)
    assert start == pytest.approx([2 / 5, 1 / 5, 1 / 5, 1 / 5])
    # Columns: 1/5 (0 + 1/2 + 0 + 1/4), 1/5 (2/2 + 0 + 1/2 + 1/4), 1/5 (2/4 + 1/2 + 0 + 1/4), 1/5 (2/4 + 0 + 1/2 + 1/4).
    once = pagerank(HAND, start, 1)
    assert once == pytest.approx([3 / 20, 7 / 20, 5 / 20, 5 / 20])
    # Again, from (3, 7, 5, 5) / 20: 7/2 + 5/4, 3/2 + 5/2 + 5/4, 3/4 + 7/2 + 5/4, 3/4 + 5/2 + 5/4, all over 20.
    assert pagerank(HAND, start, 2) == pytest.approx([19 / 80, 21 / 80, 22 / 80, 18 / 80])
    # Patches (7, 5, 5): mean 17/3, so (21, 15, 15) / 17, off 1 by (4, -2, -2) / 17: (16 + 4 + 4) / 3 / 289.
    assert head_variance(once[1:]) == pytest.approx(8 / 289)


def test_the_whole_stage_by_hand():
    # After one round the patches order 0, then 1 and 2 (equal, the lower first); after two rounds 1, 0, 2.
    def place(keep, keys=((1.0,), (1.0,), (1.0,))):
        return constructed_place(keep, attention=[HAND], keys=keys, prefix=1, class_token=True)

    assert kept(place(1), iterations=1, similarity=0) == [0]
    assert kept(place(1), iterations=2, similarity=0) == [1]
    assert kept(place(2), iterations=2, similarity=0) == [0, 1]
    # Similarity: of three tokens the less important floor(3 / 2) = 1 may go, which is 2 (1 precedes it by the tie).
    assert kept(place(2), iterations=2) == [0, 1]
    # Keeping one: similarity takes one (2), importance one of the rest.
    assert kept(place(1), iterations=2) == [1]


def test_pagerank_is_a_power_of_the_transposed_matrix():
    attention = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    start = start_scores(9, class_token=True)
    for head in attention:
        loops = torch.tensor(pagerank(head.tolist(), start, 5), dtype=torch.float64)
        matrix = torch.linalg.matrix_power(head.T, 5) @ torch.tensor(start, dtype=torch.float64)
        torch.testing.assert_close(loops, matrix)
        assert loops.sum().item() == pytest.approx(1)
        torch.testing.assert_close(
            torch.tensor(head_variance(loops.tolist())), (loops * 9).var(correction=0).float(), check_dtype=False
        )


def test_paper_iterations():
    assert [paper_iterations(block) for block in range(12)] == [30] * 3 + [5] * 6 + [1] * 3


def test_more_rounds_change_the_kept_set():
    # Tokens 2, 3 and 4, whom nobody looks at, look at 0; 0 looks at 1, which looks at itself.
    row = {target: [float(j == target) for j in range(5)] for target in (0, 1)}
    place = constructed_place(1, attention=[[row[1], row[1], row[0], row[0], row[0]]])
    assert kept(place, iterations=1, similarity=0) == [0]
    assert kept(place, iterations=30, similarity=0) == [1]


def test_the_class_token_starts_with_more():
    # The class token looks at patch 0, the three patches at patch 1 (0.6) and patch 2 (0.4):
    # patch 0 gets 1 of the class token's share, patch 1 gets 1.8. sqrt(4) = 2 times as much turns it: 2 against 1.8.
    attention = [[[0, 1, 0, 0], *[[0, 0, 0.6, 0.4]] * 3]]
    place = constructed_place(1, attention=attention, prefix=1, class_token=True)
    assert kept(place, iterations=1, similarity=0) == [0]
    assert kept(place, iterations=1, similarity=0, uniform_start=True) == [1]
    registers_alone = constructed_place(1, attention=attention, prefix=1, class_token=False)
    assert kept(registers_alone, iterations=1, similarity=0) == [1]


def test_heads_fuse_by_root_mean_square():
    # Means 0.30, 0.35, 0.35; mean squares 0.18, 0.1225, 0.2125: what one head finds important outranks patch 1.
    fused = fuse_heads([[0.6, 0.35, 0.05], [0.0, 0.35, 0.65]], [1, 1])
    assert fused == pytest.approx([math.sqrt(0.18), 0.35, math.sqrt(0.2125)])
    heads = [same_rows([0.6, 0.35, 0.05]), same_rows([0.0, 0.35, 0.65])]
    assert kept(constructed_place(2, attention=heads), iterations=1, similarity=0, variance=OFF) == [0, 2]


# Variances 0.1, 2.7648 (all on one token) and 0.
MODERATE, COLLAPSED, FLAT = [0.35, 0.30, 0.20, 0.15], [0.01, 0.01, 0.01, 0.97], [0.25] * 4


def test_the_variance_filter_changes_the_kept_set():
    heads = [MODERATE, COLLAPSED, FLAT]
    assert [head_variance(head) for head in heads] == pytest.approx([0.1, 2.7648, 0])
    assert passing_heads(heads, (0.01, 0.7)) == [1, 0, 0]
    place = constructed_place(2, attention=[same_rows(head) for head in heads])
    assert kept(place, iterations=1, similarity=0) == [0, 1]
    assert kept(place, iterations=1, similarity=0, variance=OFF) == [0, 3]
    # Where no head passes, all count.
    assert passing_heads(heads, (5.0, 6.0)) == [1, 1, 1]
    assert kept(place, iterations=1, similarity=0, variance=(5.0, 6.0)) == [0, 3]


# Patch 3 is patch 0's twin; 4 and 5 are like nothing that matters more.
RANKED = [0.30, 0.25, 0.20, 0.10, 0.09, 0.06]
TWINS = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 1.0, 0.1, 0], [2.0, 0, 0, 0], [0, 0, 1.0, 0], [0.2, 0, 0, 1.0]]


def test_similarity_removes_what_importance_keeps():
    place = constructed_place(4, attention=[same_rows(RANKED)], keys=TWINS)
    assert kept(place, iterations=1, similarity=0) == [0, 1, 2, 3]
    assert kept(place, iterations=1, similarity=1) == [0, 1, 2, 4]
    # Never more than the place removes, n - K = 2, here both by similarity: 3, 4, 5 have cosines 1, 0.1 and 0.2.
    assert kept(place, iterations=1, similarity=10) == [0, 1, 2, 4]


def test_similarity_takes_from_the_less_important_half():
    # 1 and 2 are nearly twins too, but both are in the more important half.
    assert similar_tokens(RANKED, TWINS, 1, []) == [3]
    # The other way round 0 is the candidate, and its twin 3 stays.
    assert similar_tokens(RANKED[::-1], TWINS, 1, []) == [0]
    # Of an odd number the middle one is safe.
    assert similar_tokens([0.5, 0.3, 0.2], [[1.0], [1.0], [1.0]], 1, []) == [2]
    # At equal similarity the lower token goes.
    assert similar_tokens([0.4, 0.3, 0.1, 0.2], [[1.0]] * 4, 1, []) == [2]


def test_partitions_by_hand():
    order = [4, 0, 3, 1, 2]
    assert partners(order, "sequential_u") == {1: [0, 3, 4], 2: [0, 3, 4]}
    assert partners(order, "sequential_i") == {0: [1, 2, 3], 4: [1, 2, 3]}
    assert partners(order, "alternate") == {0: [2, 3, 4], 1: [2, 3, 4]}
    assert partners(order, "none") == {0: [4], 1: [4, 0, 3], 2: [4, 0, 3, 1], 3: [4, 0], 4: []}
    # 0 and 3 are twins: of them the less important goes, or with the important half as candidates 0, for its twin.
    assert similar_tokens(RANKED, TWINS, 1, [], partition="none") == [3]
    assert similar_tokens(RANKED, TWINS, 1, [], partition="sequential_i") == [0]
    # In turns 1, 3, 5 are candidates, and 1 has its own twin in 2: 1 / sqrt(1.01), less than 3's.
    assert similar_tokens(RANKED, TWINS, 2, [], partition="alternate") == [1, 3]


def test_metrics_by_hand():
    a, b = [1.0, 2.0, -1.0], [4.0, 0.0, -1.0]
    assert closeness(a, b, "dot") == 5
    assert closeness(a, b, "manhattan") == -5
    assert closeness(a, b, "euclidean") == pytest.approx(-math.sqrt(13))
    assert closeness(a, b, "minkowski_3") == pytest.approx(-(35 ** (1 / 3)))
    assert closeness(a, b, "chebyshev") == -3
    assert closeness(a, b, "cosine") == pytest.approx(5 / math.sqrt(6 * 17))


def test_heads_may_be_fused_by_their_mean():
    # Means 0.30, 0.35, 0.35 where root mean squares are 0.42, 0.35, 0.46.
    heads = [same_rows([0.6, 0.35, 0.05]), same_rows([0.0, 0.35, 0.65])]
    place = constructed_place(2, attention=heads)
    assert kept(place, iterations=1, similarity=0, variance=OFF, fusion="mean") == [1, 2]


def test_features_by_hand():
    place = constructed_place(1, keys=[[1.0], [2.0]], hidden=[5.0, 6.0], prefix=1)
    place.queries = [[[0.0], [3.0], [4.0]], [[0.0], [5.0], [8.0]]]
    place.values = [[[0.0], [7.0], [9.0]]]
    place.entered = [[8.0], [9.0]]
    assert feature_of(place, "key") == [[1], [2]]
    assert feature_of(place, "query") == [[4], [6]]
    assert feature_of(place, "value") == [[7], [9]]
    assert feature_of(place, "x") == [[5], [6]]
    assert feature_of(place, "x_pre") == [[8], [9]]


def test_the_partition_is_voted_by_one_round():
    # One round: columns 1.5, 1.3, 1.1, 0.1, so 2 is in the lower half. It looks at itself, and ends with nearly all.
    attention = [[0.5, 0.5, 0.0, 0.0], [0.4, 0.5, 0.1, 0.0], [0.0, 0.0, 1.0, 0.0], [0.6, 0.3, 0.0, 0.1]]
    keys = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 1.0]]
    place = constructed_place(3, attention=[attention], keys=keys)
    assert pagerank(attention, [0.25] * 4, 1) == pytest.approx([1.5 / 4, 1.3 / 4, 1.1 / 4, 0.1 / 4])
    assert pagerank(attention, [0.25] * 4, 30)[2] > 0.7
    assert kept(place, iterations=30) == [0, 1, 3]  # 2 is nearly 0's twin
    assert kept(place, iterations=30, similarity=0) == [0, 1, 2]
