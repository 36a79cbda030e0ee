from __future__ import annotations

import pytest
import torch
from families import build, images
from torch import Tensor, nn

from tokenprune.training import budget


@pytest.fixture
def model() -> nn.Module:
    return build("class_token")


@pytest.fixture(scope="session")
def data() -> tuple[Tensor, Tensor]:
    """24 images and labels."""
    vit = build("class_token")
    return images(vit, 24), torch.arange(24) % vit.num_classes


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a few steps are not brought to their budget in the end."""
    monkeypatch.setattr(budget, "ROUNDS", 0)
