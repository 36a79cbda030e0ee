"""Classification by the nearest neighbours in feature space: what a backbone knows, without training a classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_predict(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int = 10) -> Tensor:
    """Class of each test item by the votes of its `k` nearest training items, weighted by exp(cosine / 0.07).

    Features are [n, C] and labels integers [n]; the result is [number of test items]. The weight and its temperature
    are those of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv
    1805.01978, section 3.4), which DINO and DINOv2 report. A tie goes to the lower class. Raises ValueError where `k`
    is not between 1 and the number of training items.
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k={k}: must lie between 1 and the number of training items, {len(train_features)}")
    cosines = F.normalize(test_features.double(), dim=1) @ F.normalize(train_features.double(), dim=1).T
    nearest, places = cosines.topk(k, dim=1)
    votes = F.one_hot(train_labels[places], int(train_labels.max()) + 1).double()
    return torch.einsum("nk,nkc->nc", (nearest / 0.07).exp(), votes).argmax(dim=1)


def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 10
) -> float:
    """Share in [0, 1] of the test items that `knn_predict` puts into their class."""
    predicted = knn_predict(train_features, train_labels, test_features, k)
    return float((predicted == test_labels).double().mean())
