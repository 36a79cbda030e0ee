"""A state is gone on from with the images, labels and weights that it is of, and with others it is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import datasets
import pytest
import torch
from families import build
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from tokenprune import TokenPruneError
from tokenprune.evals.data import ImageData, open_data
from tokenprune.evals.identity import of_files
from tokenprune.evals.sources import digits_training
from tokenprune.training import train
from tokenprune.training.identity import of_data, of_weights, other_data, same_weights
from tokenprune.training.state import FILE
from tokenprune.training.work import Work

Data = tuple[Tensor, Tensor]
pytestmark = [pytest.mark.filterwarnings("ignore:what was learned costs"), pytest.mark.usefixtures("short")]
QUICK: dict[str, Any] = {"flops": 0.6, "batch_size": 4, "learning_rate": 0.02, "save_every": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of two classes."""
    for label in range(2):
        (tmp_path / "pictures" / f"class_{label}").mkdir(parents=True)
        for i in range(3):
            picture = Image.effect_noise((28, 20 + i), 20 + 30 * i).convert("RGB")
            picture.save(tmp_path / "pictures" / f"class_{label}" / f"{i}.png")
    return tmp_path / "pictures"


def rewrite(state: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """`change` is given what a state holds by name, as its JSON has it, and its tensors."""
    with safe_open(state, framework="pt") as file:
        described = json.loads(file.metadata()["state"])
    held, tensors = dict(described["state"]["items"]), load_file(state)
    change(held, tensors)
    described["state"]["items"] = list(held.items())
    save_file(tensors, state, {"state": json.dumps(described)})


def told(source: object, other: object, transform: Any = None, changed: Any = None, seed: int = 0) -> list[str]:
    """What a training on `other` is told that has begun on `source`."""
    first, second = open_data(source, transform), open_data(other, changed or transform)
    return other_data(of_data(first, seed), of_data(second, seed), second, seed)


@pytest.mark.parametrize("whole", [True, False])
def test_other_tensors_are_refused(model: nn.Module, data: Data, tmp_path: Path, whole: bool) -> None:
    images, labels = data
    if whole:
        train(model, data, output=tmp_path, **QUICK)
    else:
        spoiled = images.clone()
        spoiled[:, :, 0, 0] = float("nan")
        with pytest.raises(TokenPruneError, match="is nan"):
            train(model, (spoiled, labels), output=tmp_path, **{**QUICK, "save_every": 1})
        assert not (tmp_path / FILE).exists()
        one = images.clone()
        one[torch.randperm(24, generator=torch.Generator().manual_seed(0))[9]] = float("nan")
        with pytest.raises(TokenPruneError, match="is that of step 2"):
            train(model, (one, labels), output=tmp_path, **QUICK)
    before = (tmp_path / FILE).read_bytes()
    for other, what in (((images.flip(0), labels), "other images"), ((images, labels.flip(0)), "other labels")):
        with pytest.raises(TokenPruneError, match=rf"{tmp_path.name}.* of a training on {what} .*--output of its own"):
            train(model, other, output=tmp_path, **QUICK)
    assert (tmp_path / FILE).read_bytes() == before
    assert train(model, data, output=tmp_path, **QUICK).found["steps"] == 6


def test_tensors_that_are_nearly_the_same_are_others(data: Data) -> None:
    images, labels = data
    assert told(data, (images.clone(), labels.int())) == []
    assert told(data, (images + 1e-3 * torch.randn_like(images).sign(), labels)) == ["images"]
    assert told(data, (images, torch.where(torch.arange(24) == 23, 0, labels))) == ["labels"]
    assert told(data, (images[..., :16], labels)) == ["sizes of images", "images"]
    mended = images.clone()
    mended[0, 0, 3, 4] = float("nan")
    assert told((mended, labels), data) == []
    assert told((mended, labels), (images.flip(0), labels)) == ["images"]
    maps = labels[:, None, None].expand(24, 20, 28) % 5
    assert told((images, maps), (images, maps.clone())) == []
    assert told((images, maps), (images, maps.flip(0))) == ["labels"]


def test_other_files_are_told(folder: Path, tmp_path: Path) -> None:
    plain = v2.Compose([v2.Resize((20, 28)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    moved = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    assert told(folder, moved, plain) == []
    flipped = v2.Compose([v2.RandomHorizontalFlip(), plain])
    assert told(folder, moved, plain, flipped) == ["images, or another transform"]
    assert told(folder, moved, flipped) == []
    generator = torch.Generator().manual_seed(0)
    assert told(folder, moved, lambda image: plain(image) + torch.rand(3, 20, 28, generator=generator)) == []
    Image.new("RGB", (28, 20)).save(moved / "class_0" / "1.png")
    assert told(folder, moved, plain) == ["sizes of files"]
    (moved / "class_0" / "1.png").rename(moved / "class_1" / "3.png")
    assert told(folder, moved, plain) == ["names of files", "labels", "sizes of files"]


def test_a_folder_is_the_same_from_within(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = v2.Compose([v2.Resize((20, 28)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    seen = open_data(folder, plain)
    monkeypatch.chdir(folder)
    assert told(".", folder, plain) == []
    assert other_data(of_data(seen, 0), of_data(open_data(".", plain), 0), seen, 0) == []
    for file in (folder / "class_0" / "1.png", folder / "class_0" / "2.png", folder / "class_1"):
        file.rename(folder.parent / file.name)
    monkeypatch.chdir(folder / "class_0")  # of one picture
    assert of_files([Path("0.png")], [0]) == of_files([folder / "class_0" / "0.png"], [0])


def test_a_transform_that_seldom_changes_anything_of_its_own_is_not_another(folder: Path) -> None:
    """The images that a generator of its own blackens are few, and most readings have none of them."""
    calls = iter(range(1000))
    plain = v2.Compose([v2.Resize((20, 28)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])

    def seldom(image: Any) -> Tensor:
        return plain(image) * (next(calls) % 40 != 3)

    assert told(folder, folder, seldom) == []
    assert next(calls) > 18


def test_other_masks_are_told(folder: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(folder / "class_0", pairs / "images")
    (pairs / "masks").mkdir()
    for i in range(3):
        Image.new("L", (28, 20 + i), 1).save(pairs / "masks" / f"{i}.png")
    transform = v1.Compose([v1.Resize((20, 28)), v1.ToTensor()])
    other = tmp_path / "other"
    shutil.copytree(pairs, other)
    assert told(pairs, other, transform) == []
    Image.effect_noise((28, 20), 90).save(other / "masks" / "0.png")
    assert told(pairs, other, transform) == ["sizes of files"]
    (other / "masks" / "0.png").rename(other / "masks" / "0.tiff")
    assert told(pairs, other, transform) == ["names of files", "sizes of files"]


def test_other_rows_are_told(data: Data) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [Image.effect_noise((28, 20), 30 * i) for i in range(20)]

    def rows(labels: list[int], images: list[Any]) -> Any:
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    def transform(image: Any) -> Tensor:
        return v2.functional.pil_to_tensor(image).float()

    first = rows([0, 1] * 10, pictures)
    assert told(first, rows([0, 1] * 10, pictures), transform) == []
    assert told(first, rows([0, 1] * 9 + [0, 0], pictures), transform) == ["labels"]
    assert told(first, rows([0, 1] * 10, pictures[::-1]), transform) == ["images, or another transform"]


def test_drawn_images_of_another_seed_are_told() -> None:
    assert told(digits_training(10, 3), digits_training(10, 3)) == []
    assert told(digits_training(10, 3), digits_training(10, 4)) != []


def test_a_data_set_that_says_nothing_is_looked_at(data: Data) -> None:
    class Own(Dataset[tuple[Tensor, int]]):
        identity = torch.zeros(3)  # of persons, as torchvision's CelebA has it

        def __init__(self, far: float) -> None:
            self.far = far

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return data[0][index] + self.far * torch.randn(3, 1, 1), int(data[1][index])

    first, same, other = (ImageData("own", Own(far), 24, 5) for far in (0.1, 0.1, 0.3))
    assert told(first, same, seed=5) == []
    assert told(first, other, seed=5) == ["images, or another transform"]


def test_what_a_worker_opens_is_not_opened_in_front_of_it(model: nn.Module, data: Data, tmp_path: Path) -> None:
    """A file of many images that a data set opens when it is first read from, and that processes cannot share; and a
    transform with a generator of its own, which starts anew in every worker."""

    class Opened(Dataset[tuple[Tensor, int]]):
        def __init__(self) -> None:
            self.opened_by, self.generator = 0, torch.Generator()
            self.generator.seed()

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            self.opened_by = self.opened_by or os.getpid()
            assert self.opened_by == os.getpid()
            return data[0][index] + torch.randn(3, 1, 1, generator=self.generator), int(data[1][index])

    for _ in range(2):
        opened = ImageData("opened", Opened(), 24, model.num_classes)
        train(model, opened, output=tmp_path, workers=1, **{**QUICK, "epochs": 1})


def test_a_state_that_does_not_say_what_it_is_of_is_taken(model: nn.Module, data: Data, tmp_path: Path) -> None:
    found = train(model, data, output=tmp_path, **QUICK)

    def older(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        state.pop("identity")
        for name in [name for name in tensors if name.startswith(".identity")]:
            del tensors[name]

    rewrite(tmp_path / FILE, older)
    assert train(model, (data[0].flip(0), data[1]), output=tmp_path, **QUICK).found["loss"] == found.found["loss"]
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(1.01)
    with pytest.raises(TokenPruneError, match="of a model with other weights"):
        train(model, data, output=tmp_path, **QUICK)


@pytest.mark.parametrize("method", ["ltmp", "dynamicvit"])
def test_other_weights_of_any_part_are_refused(model: nn.Module, data: Data, tmp_path: Path, method: str) -> None:
    """The classifier's too, which is also of the teacher, and weights that leave the norms as they are."""
    train(model, data, method, output=tmp_path, **{**QUICK, "epochs": 1})
    for name in ("head.weight", "patch_embed.proj.bias", "blocks.2.attn.qkv.weight"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            weight = other.get_parameter(name)
            weight.copy_(weight.flip(0) if weight.ndim > 1 else weight + 1e-3)
        with pytest.raises(TokenPruneError, match="of a model with other weights, which it does not hold"):
            train(other, data, method, output=tmp_path, **{**QUICK, "epochs": 1})


def test_a_model_that_is_trained_goes_on_from_either_weights(data: Data, tmp_path: Path) -> None:
    options = {**QUICK, "epochs": 1, "model_rate": 1e-3, "distill_logits": 0.0, "distill_tokens": 0.0}
    model = build("class_token")
    train(model, data, "dynamicvit", output=tmp_path, **options)
    reached = copy.deepcopy(model.state_dict())
    for one in (model, build("class_token")):
        train(one, data, "dynamicvit", output=tmp_path, **options)
        assert all(torch.equal(value, reached[name]) for name, value in one.state_dict().items())
    other = build("class_token")
    with torch.no_grad():
        other.head.weight.neg_()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(TokenPruneError, match=r"those that it began with or those in .*model\.safetensors"):
        train(other, data, "dynamicvit", output=tmp_path, **options)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_model_whose_training_was_interrupted_goes_on(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same process, with weights that are neither those it began with nor those of the state."""
    options = {**QUICK, "epochs": 1, "model_rate": 1e-3, "distill_logits": 0.0, "distill_tokens": 0.0}
    whole, model = build("class_token"), build("class_token")
    train(whole, data, "dynamicvit", output=tmp_path / "whole", **options)
    gradients = Work._gradients

    def interrupted(self: Work, *args: Any) -> list[float]:
        if self.step == 3:
            raise KeyboardInterrupt
        return gradients(self, *args)

    monkeypatch.setattr(Work, "_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, "dynamicvit", output=tmp_path / "own", **options)
    monkeypatch.undo()
    shutil.copytree(tmp_path / "own", tmp_path / "another")
    with pytest.raises(TokenPruneError, match="of a model with other weights"):
        train(model, data, "dynamicvit", output=tmp_path / "another", **options)
    train(model, data, "dynamicvit", output=tmp_path / "own", **options)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_that_are_no_numbers_are_themselves() -> None:
    """A mask in a buffer, and what a module keeps beside its tensors."""
    mask = torch.tensor([0.0, float("-inf"), float("nan"), 1.0])
    taken = of_weights([mask, None])  # type: ignore[list-item]
    assert same_weights(taken, of_weights([mask.clone()]))
    for i, value in ((0, float("-inf")), (1, 0.0), (2, 0.0), (3, 1.1)):
        other = mask.clone()
        other[i] = value
        assert not same_weights(taken, of_weights([other]))


def test_weights_are_the_same_where_machines_round_otherwise() -> None:
    weights, steps = [torch.randn(40, 30), torch.ones(3)], torch.tensor(1000)
    taken = of_weights([*weights, steps])
    assert taken.shape == (2, 64)
    assert same_weights(taken, of_weights([one * (1 + 1e-6) for one in weights]))
    assert not same_weights(taken, of_weights([one * (1 + 1e-4) for one in weights]))
    assert not same_weights(taken, of_weights(weights[:1]))


def test_a_state_of_a_gpu_goes_on_without_one(
    model: nn.Module, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_on_gpu = list[Tensor]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_on_gpu.append)
    found = train(model, data, "dynamicvit", output=tmp_path, **{**QUICK, "epochs": 1})

    def on_gpu(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[".generators.1"] = torch.zeros(1, 16, dtype=torch.uint8)
        state["generators"].append({"tensor": ".generators.1"})

    rewrite(tmp_path / FILE, on_gpu)
    before = torch.get_rng_state()
    assert train(model, data, "dynamicvit", output=tmp_path, **{**QUICK, "epochs": 1}).found == found.found
    assert torch.equal(torch.get_rng_state(), before)
    assert set_on_gpu == []


@pytest.mark.parametrize("broken", ["step", "optimizer", "generators"])
def test_a_state_with_a_part_missing_is_refused(model: nn.Module, data: Data, tmp_path: Path, broken: str) -> None:
    train(model, data, output=tmp_path, **{**QUICK, "opt": "adamw"})
    rewrite(tmp_path / FILE, lambda state, tensors: state.pop(broken))
    with pytest.raises(TokenPruneError, match=rf"no state that tokenprune train has written for this model.*{broken}"):
        train(model, data, output=tmp_path, **{**QUICK, "opt": "adamw"})


def test_a_model_of_other_shapes_is_left_as_it_is(data: Data, tmp_path: Path) -> None:
    options = {**QUICK, "epochs": 1, "model_rate": 1e-3}
    train(build("class_token"), data, "dynamicvit", output=tmp_path, **options)
    other = build("class_token")
    other.reset_classifier(7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(TokenPruneError, match="of a model of other shapes"):
        train(other, data, "dynamicvit", output=tmp_path, **options)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_machines_that_do_not_share_the_folder_are_refused(
    model: nn.Module, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which another one has found no state, made up."""
    train(model, data, output=tmp_path, **QUICK)
    gather = accelerate.Accelerator.gather

    def with_another(self: Any, x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x)]) if x.shape == (1,) else gather(self, x)

    monkeypatch.setattr(accelerate.Accelerator, "gather", with_another)
    with pytest.raises(TokenPruneError, match=r"step 6, 0 for one process and another: .* that all machines share"):
        train(model, data, output=tmp_path, **QUICK)
