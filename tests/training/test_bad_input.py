"""Wrong input to a training is a clear error, and the last good state and what was learned before stay as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from families import build
from learned_thresholds import parts
from PIL import Image
from torch import Tensor, nn

import tokenprune
from tokenprune import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.training import train
from tokenprune.training.state import FILE

Data = tuple[Tensor, Tensor]
pytestmark = [pytest.mark.filterwarnings("ignore:what was learned costs"), pytest.mark.usefixtures("short")]
QUICK = {"flops": 0.6, "batch_size": 4, "learning_rate": 0.02, "save_every": 2}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    parts(build("class_token"), [0.8] * 4, [0.01] * 4).save(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize("flops", [0, 0.0, 1.5, -0.1, "half", True, float("nan")])
def test_a_wrong_budget(model: nn.Module, data: Data, flops: Any) -> None:
    with pytest.raises(BudgetError, match=r"flops must be a share in \(0, 1\]"):
        train(model, data, flops=flops)


def test_images_that_are_missing(model: nn.Module, data: Data, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenPruneError, match="empty holds no pictures"):
        train(model, tmp_path / "empty", transform=lambda image: image, **QUICK)
    with pytest.raises(TokenPruneError, match="no images"):
        train(model, (data[0][:0], data[1][:0]), **QUICK)
    with pytest.raises(TokenPruneError, match=r"24 images, and a step takes 32.*use a smaller batch_size"):
        train(model, data, flops=0.6, batch_size=32)


def test_labels_that_are_missing_or_wrong(model: nn.Module, data: Data, tmp_path: Path) -> None:
    with pytest.raises(TokenPruneError, match="no labels"):
        train(model, data[0], **QUICK)
    with pytest.raises(TokenPruneError, match="24 images and 23 labels"):
        train(model, (data[0], data[1][:23]), **QUICK)
    for wrong in (-1, model.num_classes):
        with pytest.raises(TokenPruneError, match=rf"labels from .* and the model has {model.num_classes} classes"):
            train(model, (data[0], torch.full_like(data[1], wrong)), **QUICK)
    headless = build("class_token")
    headless.reset_classifier(0, "")
    with pytest.raises(UnsupportedModel, match="no classifier"):
        train(headless, data, **QUICK)
    headless.reset_classifier(0)  # pooled, so that its features are of the shape of logits
    with pytest.raises(UnsupportedModel, match="no classifier"):
        train(headless, data, **QUICK)


def test_methods_and_models_that_learn_nothing(model: nn.Module, data: Data) -> None:
    with pytest.raises(UnsupportedMethod, match="top_k learns nothing"):
        train(model, data, "top_k", flops=0.6)
    with pytest.raises(UnsupportedModel):
        train(nn.Linear(2, 2), data, flops=0.6)
    with pytest.raises(UnsupportedMethod, match="unknown method"):
        train(model, data, "nothing", flops=0.6)
    with pytest.raises(UnsupportedMethod, match="learns nothing; leave them out"):
        tokenprune.patch(model, "tome", weights=parts(model, [0.8] * 4, [0.0] * 4))
    for options in ({"batch_size": 0}, {"epochs": -1}, {"accumulate": 0}, {"save_every": 0}):
        with pytest.raises(BudgetError, match=next(iter(options))):
            train(model, data, flops=0.6, **options)
    with pytest.raises(TokenPruneError, match="plateau"):
        train(model, data, sched="plateau", **QUICK)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", [1.5, "a", -1, True, None, float("nan"), 2**32, 2**70]),
        ("workers", [-1, 1.5, "a", True, None, 10**6]),
        ("epochs", [0, 1.5, "a", True, float("nan")]),
        ("batch_size", [-1, 1.5, "a", True]),
        ("accumulate", [-1, 1.5, "a", None]),
        ("save_every", [-1, 1.5, "a", None]),
        ("learning_rate", [-1, 0, "a", None, float("nan"), float("inf")]),
        ("opt", ["", 3, "nothing"]),
        ("sched", ["", 3, ["cosine"]]),
        ("output", ["", 3]),
        ("transform", [3, len]),
        ("split", ["train"]),
    ],
)
def test_an_argument_that_is_nonsense_is_named(model: nn.Module, data: Data, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(TokenPruneError, match=name):
            train(model, data, **{**QUICK, name: value})


def test_a_seed_of_numpy_is_one(model: nn.Module, data: Data, tmp_path: Path) -> None:
    assert type(train(model, data, seed=np.int64(3), output=tmp_path, **QUICK).found["seed"]) is int


def test_images_and_options_that_are_none(model: nn.Module, data: Data, tmp_path: Path) -> None:
    with pytest.raises(TokenPruneError, match=r"images must be one tensor \[N, C, H, W\], got a tensor \[24, 20, 28\]"):
        train(model, (data[0][:, 0], data[1]), **QUICK)
    with pytest.raises(TokenPruneError, match=r"images must be floating, .* got torch\.uint8"):
        train(model, (data[0].byte(), data[1]), **QUICK)
    with pytest.raises(TokenPruneError, match=r"places=range\(1, 3\) cannot be written .* plain numbers"):
        train(model, data, places=range(1, 3), **QUICK)
    with pytest.raises(TokenPruneError, match=r"transform=3 must be a function"):
        train(model, tmp_path, transform=3, **QUICK)


def test_a_loss_that_is_not_finite_leaves_the_last_state(model: nn.Module, data: Data, tmp_path: Path) -> None:
    from tokenprune.training.sampling import Order

    fifth = next(batch for k, batch in enumerate(Order(24, 4, 6, 1, seed=0, process=0, processes=1)) if k == 4)
    broken = data[0].clone()
    broken[fifth[0][1]] = float("nan")
    with pytest.raises(TokenPruneError, match=r"the loss of step 5 is nan for the task .* is that of step 4"):
        train(model, (broken, data[1]), output=tmp_path, **QUICK)
    with torch.no_grad():
        tokenprune.patch(model, weights=tmp_path)
        assert model(data[0]).isfinite().all()
    tokenprune.unpatch(model)
    assert train(model, data, output=tmp_path, **QUICK).found["steps"] == 6  # mended, it goes on


def test_parts_of_another_architecture_are_refused(model: nn.Module, trained: Path) -> None:
    tokenprune.patch(model, weights=trained)
    for family, differs in (("rotary_registers", "prefix_tokens 1, not 5"), ("bias_own_table", "")):
        other = build(family)
        if differs:
            with pytest.raises(TokenPruneError, match=f"another architecture than .*{differs}.*tokenprune train"):
                tokenprune.patch(other, weights=trained)
    shallow = build("class_token")
    shallow.blocks = shallow.blocks[:3]
    with pytest.raises(TokenPruneError, match="blocks 4, not 3"):
        tokenprune.patch(shallow, "ltmp", weights=trained)
    with pytest.raises(TokenPruneError, match="do not fit ltmp in the blocks 1, 2"):
        tokenprune.patch(model, "ltmp", weights=trained, places=(1, 2))


def test_files_that_are_cut_off_changed_or_pickled_are_refused(model: nn.Module, trained: Path, tmp_path: Path) -> None:
    file = trained / "learned.safetensors"
    tokenprune.patch(tokenprune.unpatch(model), weights=file)
    torch.save({"0.merge": torch.tensor(0.5)}, tmp_path / "learned.pt")
    with pytest.raises(TokenPruneError, match=r"refused: only \.safetensors are read, a pickle can run any code"):
        tokenprune.patch(model, weights=tmp_path / "learned.pt")
    shutil.copy(tmp_path / "learned.pt", tmp_path / "disguised.safetensors")
    with pytest.raises(TokenPruneError, match="no safetensors file, whatever its name"):
        tokenprune.patch(model, weights=tmp_path / "disguised.safetensors")
    with pytest.raises(TokenPruneError, match="there is no checkpoint"):
        tokenprune.patch(model, weights=tmp_path / "nowhere")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 3])
    with pytest.raises(TokenPruneError, match="no safetensors file"):
        tokenprune.patch(model, weights=trained)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(TokenPruneError, match="cut off, changed, or of another training"):
        tokenprune.patch(model, weights=trained)
    file.write_bytes(whole)
    described = json.loads((trained / "learned.json").read_text())
    for text, told in (
        ("{", "none that tokenprune train has written"),
        ("[]", "none that tokenprune train has written"),
        (json.dumps({**described, "version": 9}), "has version 9"),
        (json.dumps({key: described[key] for key in described if key != "norms"}), "norms"),
        (json.dumps({**described, "method": "tome"}), "tome learns nothing"),
    ):
        (trained / "learned.json").write_text(text)
        with pytest.raises(TokenPruneError, match=told):
            tokenprune.patch(model, weights=trained)
    (trained / "learned.json").unlink()
    with pytest.raises(TokenPruneError, match=r"without learned\.json"):
        tokenprune.patch(model, weights=trained)
    with pytest.raises(TokenPruneError, match="name the folder"):
        tokenprune.patch(model, weights=3)


def test_a_state_that_is_cut_off_or_pickled_is_refused(model: nn.Module, data: Data, tmp_path: Path) -> None:
    train(model, data, output=tmp_path, **QUICK)
    whole = (tmp_path / FILE).read_bytes()
    for content, told in (
        (whole[:100], "no safetensors"),
        ((tmp_path / "learned.safetensors").read_bytes(), "no state"),
    ):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(TokenPruneError, match=told):
            train(model, data, output=tmp_path, **QUICK)
    torch.save({}, tmp_path / FILE)
    with pytest.raises(TokenPruneError, match="no safetensors"):
        train(model, data, output=tmp_path, **QUICK)


def test_a_state_of_other_weights_is_refused(model: nn.Module, data: Data, tmp_path: Path) -> None:
    train(model, data, output=tmp_path, **QUICK)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(1.01)
    with pytest.raises(TokenPruneError, match="of a model with other weights"):
        train(model, data, output=tmp_path, **QUICK)


@pytest.mark.parametrize("name", ["notes.txt", "learned.safetensors"])
def test_a_file_in_the_place_of_the_folder_stays_as_it_is(
    model: nn.Module, data: Data, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(TokenPruneError, match="name a folder"):
        train(model, data, output=tmp_path / name, **QUICK)
    if name == "notes.txt":
        with pytest.raises(TokenPruneError, match="name a folder"):
            parts(model, [0.8] * 4, [0.0] * 4).save(tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


def test_pictures_have_the_size_that_the_model_was_made_for(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for i in range(2):
            Image.new("RGB", (90, 80), (40 * i, 99 * label, 9)).save(tmp_path / str(label) / f"{i}.png")
    small = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=2)
    assert train(small, tmp_path, **QUICK).found["steps"] == 1


def test_budgets_of_what_was_learned(model: nn.Module, data: Data, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedMethod, match=r"has to learn .* tokenprune train MODEL --method ltmp .*--flops 0\.6"):
        tokenprune.patch(model, "ltmp", flops=0.6)
    assert "ltmp" in [info.name for info in tokenprune.methods(model)]
    found = train(model, data, output=tmp_path, **QUICK)
    tokenprune.patch(model, "ltmp", flops=0.6, weights=tmp_path)
    assert tokenprune.report(model).to_dict()["budget"] == "flops=0.6"
    with pytest.raises(BudgetError, match=r"flops=0\.5 is not what these parts were trained for: flops=0\.6"):
        tokenprune.patch(model, "ltmp", flops=0.5, weights=found)
