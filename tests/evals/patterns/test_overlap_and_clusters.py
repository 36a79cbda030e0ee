"""Kept sets and cluster maps against loops, and examples worked by hand."""

import math

import pytest
import torch
from sklearn.metrics import homogeneity_completeness_v_measure

from tokenprune.evals.patterns.clusters import cluster_agreement, merges
from tokenprune.evals.patterns.overlap import ioa, iou


def sets(*members, size=6):
    return torch.stack([torch.tensor([place in kept for place in range(size)]) for kept in members])


def test_overlap_of_sets_worked_by_hand():
    first = sets({0, 1, 2, 3}, {0, 1}, {0, 1}, {4}, set(), set())
    second = sets({2, 3, 5}, {0, 1}, {2, 3}, set(), {4}, set())
    assert iou(first, second).tolist() == [2 / 5, 1, 0, 0, 0, 1]
    assert ioa(first, second).tolist() == pytest.approx([2 / 3, 1, 0, 1, 0, 1])
    assert ioa(second, first).tolist() == pytest.approx([2 / 4, 1, 0, 0, 1, 1])


def test_overlap_equals_python_sets():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(4, 3, 17, generator=generator) < share for share in (0.5, 0.3))
    for image in range(4):
        for block in range(3):
            one, other = (set(kept[image, block].nonzero().flatten().tolist()) for kept in (first, second))
            assert iou(first, second)[image, block] == pytest.approx(len(one & other) / len(one | other))
            assert ioa(first, second)[image, block] == pytest.approx(len(one & other) / len(other))


def naive_agreement(first, second):
    """From the counts of each cluster, as the paper's equations read."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a >= 0 and b >= 0]

    def entropy(labels):
        return -sum(labels.count(x) / len(labels) * math.log(labels.count(x) / len(labels)) for x in set(labels))

    of_first, of_second, joint = entropy([a for a, _ in pairs]), entropy([b for _, b in pairs]), entropy(pairs)
    homogeneity = 1 - (joint - of_second) / of_first if of_first else 1.0
    completeness = 1 - (joint - of_first) / of_second if of_second else 1.0
    total = homogeneity + completeness
    return homogeneity, completeness, 2 * homogeneity * completeness / total if total else 0.0


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_agreement_equals_loops_and_scikit_learn(dropped):
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(count, (5, 2, 23), generator=generator) for count in (4, 9))
    for labels in (first, second):
        labels[torch.rand(5, 2, 23, generator=generator) < dropped] = -1
    found = torch.stack(cluster_agreement(first, second), -1)
    for image in range(5):
        for block in range(2):
            one, other = first[image, block].tolist(), second[image, block].tolist()
            assert found[image, block].tolist() == pytest.approx(naive_agreement(one, other), abs=1e-12)
            known = [pair for pair in zip(one, other, strict=True) if min(pair) >= 0]
            expected = homogeneity_completeness_v_measure(*zip(*known, strict=True))
            assert found[image, block].tolist() == pytest.approx(expected, abs=1e-12)


def test_agreement_worked_by_hand():
    # {0 1} {2 3} and {0 1 2 3}: the second says nothing of the first. {0} {1} {2} {3}: it says all, and more.
    pairs, one, each = torch.tensor([[7, 7, 2, 2]]), torch.tensor([[1, 1, 1, 1]]), torch.tensor([[3, 2, 1, 0]])
    assert [float(value) for value in cluster_agreement(pairs, one)] == [0, 1, 0]
    assert [float(value) for value in cluster_agreement(pairs, each)] == pytest.approx([1, 0.5, 2 / 3])
    assert [float(value) for value in cluster_agreement(each, pairs)] == pytest.approx([0.5, 1, 2 / 3])
    crossed = torch.tensor([[0, 1, 0, 1]])
    assert [float(value) for value in cluster_agreement(pairs, crossed)] == pytest.approx([0, 0, 0])


def test_numbering_does_not_matter_and_nothing_in_common_is_nan():
    labels = torch.randint(5, (3, 20), generator=torch.Generator().manual_seed(2))
    renamed = torch.tensor([9, 4, 0, 30, 2])[labels]
    for value in cluster_agreement(labels, renamed):
        torch.testing.assert_close(value, torch.ones(3, dtype=torch.double))
    nothing = cluster_agreement(torch.tensor([[0, -1]]), torch.tensor([[-1, 0]]))
    assert all(bool(value.isnan()) for value in nothing)


def test_merges_are_seen_and_drops_are_none():
    assert merges(torch.tensor([[0, 1, 2, -1, -1], [0, 1, 1, 2, -1], [3, 0, 1, 2, 3]])).tolist() == [False, True, True]
