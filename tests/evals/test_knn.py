"""Votes counted by hand."""

import math

import pytest
import torch

from tokenprune.evals.knn import knn_accuracy, knn_predict


def at(*degrees):
    return torch.tensor([[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees])


def naive(train, labels, test, k):
    answers = []
    for item in test.double():
        cosine = [float(item @ other / (item.norm() * other.norm())) for other in train.double()]
        nearest = sorted(range(len(train)), key=lambda index: -cosine[index])[:k]
        votes = {}
        for index in nearest:
            votes[int(labels[index])] = votes.get(int(labels[index]), 0.0) + math.exp(cosine[index] / 0.07)
        answers.append(min(votes, key=lambda label: (-votes[label], label)))
    return answers


def test_one_near_neighbour_outvotes_two_far_ones():
    train, labels = at(0, 60, -60, 180), torch.tensor([2, 0, 0, 1])
    assert knn_predict(train, labels, at(5), k=3).tolist() == [2]
    assert knn_predict(at(20, 22, -22, 180), labels, at(0), k=3).tolist() == [0]


def test_the_length_of_a_feature_does_not_count():
    train, labels = torch.tensor([[0.1, 0.0], [50.0, 50.0], [0.0, 9.0]]), torch.tensor([0, 1, 1])
    assert knn_predict(train, labels, torch.tensor([[7.0, 1.0]]), k=1).tolist() == [0]


@pytest.mark.parametrize("k", [1, 4, 10, 40])
def test_it_equals_the_loop(k):
    generator = torch.Generator().manual_seed(k)
    train, test = (torch.randn(n, 7, generator=generator) * 3 for n in (40, 25))
    labels = torch.randint(5, (40,), generator=generator)
    expected = naive(train, labels, test, k)
    assert knn_predict(train, labels, test, k).tolist() == expected
    share = sum(answer == 2 for answer in expected) / 25
    assert knn_accuracy(train, labels, test, torch.full((25,), 2), k) == pytest.approx(share)


@pytest.mark.parametrize("k", [0, -1, 41])
def test_a_k_that_cannot_be_is_refused(k):
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"k={k}"):
        knn_predict(features, torch.zeros(40, dtype=torch.long), features, k)
