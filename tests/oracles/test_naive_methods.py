"""The oracles of uniform, top_k, evit and tome on numbers worked by hand."""

import pytest
import torch
from constructed import constructed_place, patches
from naive_methods import closest, evit, highest, mean_keys, tome, top_k, uniform
from naive_vit import Place, Token, leaving_less, leaving_share


def test_leaving_counts():
    assert [leaving_share(share)(35) for share in (1.0, 0.7, 0.6, 0.01)] == [35, 25, 21, 1]
    # 0.7 * 10 is 7.000000000000001 in some orders of rounding; it still means 7.
    assert leaving_share(0.1 + 0.6)(10) == 7
    assert leaving_less(2)(35) == 33


def test_highest_prefers_the_lower_position():
    assert highest([1.0, 3.0, 3.0, 3.0, 2.0], 2, []) == [1, 2]
    margins: list[float] = []
    assert highest([1.0, 4.0, 3.0], 1, margins) == [1]
    assert margins == [0.25]


def test_uniform_by_hand():
    # n = 7, K = 3: floor(3.5 / 3), floor(10.5 / 3), floor(17.5 / 3).
    assert patches(uniform(constructed_place(3, hidden=[0.0] * 7))) == [(1,), (3,), (5,)]


# The class token (row 0) pays its four patches 0.5, 0.1, 0.3, 0.1 in one head and 0.1, 0.1, 0.3, 0.5 in the other:
# 0.3, 0.1, 0.3, 0.3 on average.
CLASS_ATTENTION = [
    [[0.0, 0.5, 0.1, 0.3, 0.1], *[[0.2] * 5] * 4],
    [[0.0, 0.1, 0.1, 0.3, 0.5], *[[0.2] * 5] * 4],
]


def test_top_k_by_hand():
    place = constructed_place(2, attention=CLASS_ATTENTION, prefix=1, class_token=True)
    assert patches(top_k(place)) == [(0,), (2,)]  # three are equal: the lower two stay


def test_top_k_without_class_token_takes_the_attention_received_from_every_query():
    # Columns of the patches (behind one register) over all four queries: 0.9, 0.7, 1.0.
    attention = [[[0.1, 0.0, 0.1, 0.8], [0.4, 0.2, 0.3, 0.1], [0.4, 0.3, 0.2, 0.1], [0.5, 0.4, 0.1, 0.0]]]
    place = constructed_place(1, attention=attention, prefix=1, class_token=False)
    assert patches(top_k(place)) == [(2,)]
    # The register's row counts: let it look elsewhere and the columns are 1.1, 0.9, 0.3.
    attention[0][0] = [0.4, 0.2, 0.3, 0.1]
    assert patches(top_k(constructed_place(1, attention=attention, prefix=1, class_token=False))) == [(0,)]


def test_evit_by_hand():
    attention = [[[0.0, 0.4, 0.1, 0.3, 0.2], *[[0.2] * 5] * 4]]
    place = constructed_place(3, attention=attention, hidden=[10.0, 20.0, 30.0, 40.0], prefix=1, class_token=True)
    kept = evit(place)
    assert patches(kept) == [(0,), (2,), (1, 3)]
    assert [token.hidden.item() for token in kept] == pytest.approx([10, 30, 0.1 * 20 + 0.2 * 40])


KEYS = [[1.0, 0.0], [3.0, 4.0], [0.0, 1.0], [2.0, 0.0]]


def test_tome_by_hand():
    # Behind one prefix token, A is patches 1 and 3, B is patches 0 and 2. Patch 1 = (3, 4): cosine 0.6 with patch 0,
    # 0.8 with patch 2. Patch 3 points where patch 0 does: cosine 1. One pair goes: 3 into 0.
    place = constructed_place(
        3, keys=KEYS, hidden=[1.0, 2.0, 3.0, 4.0], members=[(0, 4, 5), (1,), (2,), (3,)], prefix=1, class_token=True
    )
    merged = tome(place)
    assert patches(merged) == [(1,), (0, 3, 4, 5), (2,)]
    assert [token.representative for token in merged] == [1, 0, 2]
    assert [token.hidden.item() for token in merged] == pytest.approx([2, (3 * 1 + 4) / 4, 3])

    # Without a prefix token the sides swap: patch 0 goes into patch 3.
    place = constructed_place(3, keys=KEYS, hidden=[1.0, 2.0, 3.0, 4.0])
    assert patches(tome(place)) == [(2,), (1,), (0, 3)]


def test_tome_prefers_the_lower_token_on_both_sides():
    assert closest([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], 0, [1, 2])[0] == 1
    place = constructed_place(3, keys=[[1.0], [1.0], [1.0], [1.0]])
    assert patches(tome(place)) == [(2,), (0, 1), (3,)]


def test_tome_takes_the_mean_key_of_the_heads():
    # Patch 0 is patch 1's twin in the first head and opposite in the second, patch 3's the other way round but weaker.
    keys = [[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0], [0.0, 1.0], [0.0, 1.0]]]
    tokens = [Token(torch.zeros(1), (j,), j) for j in range(4)]
    place = Place(0, tokens, 0, False, [], keys, 3)
    assert mean_keys(place) == [[0.5, 0.5], [1.5, -0.5], [0.0, 1.0], [0.5, 0.5]]
    assert patches(tome(place)) == [(2,), (1,), (0, 3)]


def test_tome_agrees_with_the_matrix_form():
    """Similarities as one matrix product and the merge as one 0/1 matrix, on 13 tokens of unequal sizes."""
    generator = torch.Generator().manual_seed(3)
    n, removed, prefix = 13, 4, 5
    keys = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    hidden = torch.randn(n, generator=generator, dtype=torch.float64)
    sizes = [1 + j % 3 for j in range(n)]
    starts = [sum(sizes[:j]) for j in range(n)]
    members = [tuple(range(s, s + size)) for s, size in zip(starts, sizes, strict=True)]
    place = constructed_place(
        n - removed, keys=keys.tolist(), hidden=hidden.tolist(), members=members, prefix=prefix, class_token=True
    )
    merged = tome(place)

    a, b = torch.arange(1, n, 2), torch.arange(0, n, 2)
    unit = keys / keys.norm(dim=1, keepdim=True)
    best, where = (unit[a] @ unit[b].T).max(dim=1)
    order = best.argsort(descending=True)
    gone, stay = order[:removed], order[removed:].sort().values
    weights = torch.zeros(n - removed, n, dtype=torch.float64)
    weights[torch.arange(len(stay)), a[stay]] = 1
    weights[len(stay) + torch.arange(len(b)), b] = 1
    weights[len(stay) + where[gone], a[gone]] = 1
    size = torch.tensor(sizes, dtype=torch.float64)
    expected = weights @ (size * hidden) / (weights @ size)
    torch.testing.assert_close(torch.stack([token.hidden[0] for token in merged]), expected)
