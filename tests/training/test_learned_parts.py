"""Learned parts belong to the patch, not to the model: copied, moved and loaded with it, and none of its weights."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import images
from learned_thresholds import parts
from torch import nn

import tokenprune

CODE = """
import sys
import tokenprune
tokenprune.methods()
found = {"accelerate", "timm", "safetensors"} & set(sys.modules)
assert not found, found
"""


def test_they_are_copied_with_the_model_and_are_none_of_its_weights(model: nn.Module) -> None:
    x, names = images(model), list(model.state_dict())
    tokenprune.patch(model, weights=parts(model, [0.7] * 4, [0.01] * 4))
    assert list(model.state_dict()) == names
    assert sorted(dict(tokenprune.learned(model).named_parameters())) == sorted(
        f"{block}.{name}" for block in range(4) for name in ("merge", "prune")
    )
    with torch.no_grad():
        out = model(x)
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(one(x), out)
            assert tokenprune.learned(one) is not tokenprune.learned(model)
        assert model.double()(x.double()).dtype == torch.float64
        assert all(p.dtype == torch.float32 for p in tokenprune.learned(model).parameters())
        assert model.bfloat16()(x.bfloat16()).isfinite().all()
    with pytest.raises(tokenprune.UnsupportedModel, match="0 patches here have learned parts"):
        tokenprune.learned(tokenprune.patch(model, "top_k", keep=0.5))


def test_the_core_imports_none_of_what_training_needs() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_a_folder_may_have_a_dot_in_its_name(model: nn.Module, tmp_path: Path) -> None:
    found = parts(model, [0.7] * 4, [0.01] * 4)
    assert found.save(tmp_path / "ltmp-0.6") == tmp_path / "ltmp-0.6" / "learned.safetensors"
    assert found.save(tmp_path / "own.safetensors") == tmp_path / "own.safetensors"
    for source in ("ltmp-0.6", "own.safetensors"):
        tokenprune.patch(model, weights=tmp_path / source)
