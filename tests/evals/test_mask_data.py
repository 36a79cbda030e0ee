"""Folders and data sets of pictures with masks: what is paired, moved as the picture is, and refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import nn

from tokenprune import cli
from tokenprune.errors import TokenPruneError
from tokenprune.evals.accuracy import evaluate
from tokenprune.evals.data import open_data
from tokenprune.evals.digit_masks import CELL, CLASSES, DigitMasks, mask_head, masked_digits, patch_features
from tokenprune.evals.digits import PIXEL_MEAN, PIXEL_STD
from tokenprune.evals.digits_vit import digits_vit
from tokenprune.evals.segmentation import mean_iou, overlaps
from tokenprune.evals.transforms import square_transform

COUNT = 6


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def transform(size=8, **options):
    return create_transform((3, size, size), is_training=False, **options)


def save(folder: Path, name: str, mask: np.ndarray | None, size: tuple[int, int] = (12, 8)) -> None:
    """A picture whose red is 20 times its mask's class, and the mask; None for a picture alone."""
    numbers = np.zeros(size[::-1], np.uint8) if mask is None else mask
    for part, picture in (("images", np.stack([20 * numbers] * 3, -1)), ("masks", mask)):
        if picture is not None:
            path = folder / part / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)


def blocks(seed: int = 0, sides: tuple[int, int] = (2, 3), cell: int = 4) -> np.ndarray:
    """[8, 12] of cells of one class, 0 to 9."""
    numbers = np.random.default_rng(seed).integers(0, 10, sides, dtype=np.uint8)
    return np.kron(numbers, np.ones((cell, cell), np.uint8))


def read(data):
    images, maps = zip(*data.batches(1), strict=True)
    return torch.cat(images), torch.cat(maps)


@pytest.mark.parametrize("masks", ["masks", "annotations", "labels"])
def test_two_folders_are_paired_by_name(masks, tmp_path):
    for number, name in enumerate(["b", "deep/a", "c"]):
        save(tmp_path, name, blocks(number))
    (tmp_path / "masks").rename(tmp_path / masks)
    (tmp_path / masks / "no-picture.png").write_bytes(b"not read")
    data = open_data(tmp_path, transform(8, crop_pct=1.0))
    assert (data.size, data.classes, data.dense) == (3, 0, True)
    images, maps = read(data)
    assert images.shape == (3, 3, 8, 8)
    assert maps.dtype == torch.int64
    for index, number in enumerate([0, 2, 1]):
        assert torch.equal(maps[index], torch.from_numpy(blocks(number).astype(np.int64))[:, 2:10])


def test_splits_are_folders_in_both(tmp_path):
    for number, name in enumerate(["training/a", "training/b", "validation/c"]):
        save(tmp_path, name, blocks(number))
    assert open_data(tmp_path, transform()).size == 1
    assert open_data(tmp_path, transform(), split="training").size == 2
    with pytest.raises(TokenPruneError, match="has no split x, only training, validation"):
        open_data(tmp_path, transform(), split="x")


def test_pascal_voc_as_torchvision_has_it(tmp_path):
    for number, name in enumerate(["a", "b", "c"]):
        save(tmp_path, name, blocks(number))
    (tmp_path / "JPEGImages").mkdir()
    for path in (tmp_path / "images").iterdir():
        Image.open(path).save(tmp_path / "JPEGImages" / f"{path.stem}.jpg")
    (tmp_path / "masks").rename(tmp_path / "SegmentationClass")
    (tmp_path / "SegmentationClass" / "c.png").unlink()  # as of those that have boxes alone
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\na\n")
    data = open_data(tmp_path, transform(8, crop_pct=1.0))
    assert torch.equal(read(data)[1][0], torch.from_numpy(blocks(1).astype(np.int64))[:, 2:10])
    assert (data.size, open_data(tmp_path, transform(), split="train").size) == (2, 1)
    (lists / "val.txt").write_text("c\n")
    with pytest.raises(TokenPruneError, match=r"SegmentationClass has no mask for .*c\.jpg"):
        open_data(tmp_path, transform())
    (lists / "val.txt").write_text("d\n")
    with pytest.raises(TokenPruneError, match=r"d\.jpg is not there"):
        open_data(tmp_path, transform())


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_mask_moves_as_its_picture_does(crop_mode, tmp_path):
    # Each class is a grey of its own, so the picture that the model sees tells the class of each pixel.
    save(tmp_path, "a", blocks(3, (4, 6), 8))
    step = transform(
        24, crop_pct=0.75 if crop_mode == "center" else 1.0, crop_mode=crop_mode, interpolation="nearest",
        mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    images, maps = read(open_data(tmp_path, step))
    greys = (images[0, 0] * 255 / 20).round().long()
    inside = maps[0] >= 0
    assert torch.equal(greys[inside], maps[0][inside])
    assert inside.all() == (crop_mode != "border"), "beside a picture kept whole there is nothing"
    assert len(set(maps[0].unique().tolist()) - {-1}) > 4


def test_masks_of_other_modes(tmp_path):
    numbers = blocks(1)
    save(tmp_path, "a", numbers)
    file = tmp_path / "masks" / "a.png"
    found = read(open_data(tmp_path, transform(8, crop_pct=1.0)))[1]
    palette = Image.fromarray(numbers)
    palette.putpalette([value for number in range(256) for value in (number, 255 - number, 7)])
    palette.save(file)
    assert Image.open(file).mode == "P"
    assert torch.equal(read(open_data(tmp_path, transform(8, crop_pct=1.0)))[1], found)
    Image.fromarray(numbers.astype(np.uint16) + 300).save(file)
    assert torch.equal(read(open_data(tmp_path, transform(8, crop_pct=1.0)))[1], found + 300)
    Image.fromarray(numbers > 4).save(file)
    assert set(read(open_data(tmp_path, transform(8, crop_pct=1.0)))[1].unique().tolist()) <= {0, 1}


def test_what_is_wrong_with_a_mask_names_it(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path, name, blocks())
    file = tmp_path / "masks" / "b.png"

    def refused(message, **options):
        with pytest.raises(TokenPruneError, match=message):
            read(open_data(tmp_path, transform(), **options))

    file.write_bytes(b"no picture")
    refused(r"b\.png is no mask that can be read")
    Image.fromarray(blocks()[:, :-1]).save(file)
    refused(r"b\.png is of 11 x 8 pixels and its picture of 12 x 8")
    Image.new("RGB", (12, 8)).save(file)
    refused(r"b\.png is of mode RGB: a mask has one channel")
    numbers = blocks()
    numbers[0, 0], numbers[1, 1] = 255, 12
    Image.fromarray(numbers).save(file)
    refused(r"b\.png has class 12, and the model tells 10 apart", num_classes=10)
    read(open_data(tmp_path, transform(), num_classes=13))
    file.unlink()
    (tmp_path / "masks" / "c.png").unlink()
    refused(r"masks has no mask for .*b\.png, nor for 1 more")


def test_a_transform_of_unknown_steps_is_refused(tmp_path):
    save(tmp_path, "a", blocks())
    with pytest.raises(TokenPruneError, match="function of the model's transform is not known"):
        open_data(tmp_path, lambda picture: torch.zeros(3, 8, 8))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Canvases of digits as files, with masks of 80 x 80 pixels, of which a strip does not count."""
    folder = tmp_path_factory.mktemp("digits")
    images, maps = masked_digits("test", COUNT)
    pixels = (images * PIXEL_STD + PIXEL_MEAN).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    for index in range(COUNT):
        mask = np.kron(maps[index].numpy().astype(np.uint8), np.ones((CELL, CELL), np.uint8))
        mask[:, :8] = 255
        for part, picture in (("images", pixels[index]), ("masks", mask)):
            (folder / part).mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / part / f"{index}.png")
    return folder


class TowerAndHead(nn.Module):
    """As a user has it: a tower without pooling, and a head on its map of features."""

    num_classes = CLASSES

    def __init__(self):
        super().__init__()
        self.tower, self.head = digits_vit(), mask_head()
        self.tower.reset_classifier(0, "")

    def forward(self, images):
        return self.head(patch_features(self.tower, images))


def digits_transform():
    return square_transform(80, (PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3)


def by_hand(model, folder):
    """Mean IoU of a loop over files and classes."""
    inside, either = np.zeros(CLASSES), np.zeros(CLASSES)
    step = digits_transform()
    for index in range(COUNT):
        mask = np.asarray(Image.open(folder / "masks" / f"{index}.png"))
        with torch.inference_mode():
            logits = model(step(Image.open(folder / "images" / f"{index}.png").convert("RGB"))[None])
            logits = nn.functional.interpolate(logits, (80, 80), mode="bilinear", align_corners=False)
        found = logits[0].argmax(0).numpy()
        for number in range(CLASSES):
            one, other = (found == number) & (mask != 255), mask == number
            inside[number] += (one & other).sum()
            either[number] += (one | other).sum()
    return float((inside[either > 0] / either[either > 0]).mean())


def test_mean_iou_over_a_folder_is_that_of_a_loop(digits):
    model = TowerAndHead().eval()
    table = evaluate(
        model, digits, ["top_k"], [{"keep": 0.5}], transform=digits_transform(), batch_size=4, baselines=False
    )
    plain, patched = table.rows
    assert plain["miou"] == pytest.approx(by_hand(model, digits), abs=1e-9)
    assert plain["miou"] > 0.4, "of six canvases; a class found where there is none counts"
    assert patched["miou_drop"] == pytest.approx(plain["miou"] - patched["miou"])
    images, maps = read(open_data(digits, digits_transform(), num_classes=CLASSES))
    with torch.inference_mode():
        logits = nn.functional.interpolate(model(images), (80, 80), mode="bilinear", align_corners=False)
    assert plain["miou"] == pytest.approx(mean_iou(overlaps(logits.argmax(1), maps, CLASSES)).item())
    assert (maps == 255).float().mean() == pytest.approx(0.1)


def test_mean_iou_on_the_command_line(digits, capsys):
    command = ["eval", "--model", "digit-masks", "--data", str(digits), "--method", "top_k", "--keep", "0.5", "--json"]
    assert cli.main([*command, "--quiet", "--threads", "1"]) == 0
    table = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in table["rows"]}
    assert rows["unpatched"]["miou"] == pytest.approx(by_hand(DigitMasks().eval(), digits), abs=1e-9)
    assert {"miou_drop", "miou_kept", "agreement"} <= set(rows["top_k"])
    assert table["environment"]["images"] == COUNT


def test_a_model_of_the_other_kind_is_told(digits, capsys, tmp_path):
    assert cli.main(["eval", "--model", "digits-vit", "--data", str(digits), "--threads", "1"]) == 1
    error = capsys.readouterr().err
    assert "has class 10, and the model tells 10 apart" in error or "a class for each place" in error
    for number in range(CLASSES):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (80, 80)).save(tmp_path / str(number) / "a.png")
    assert cli.main(["eval", "--model", "digit-masks", "--data", str(tmp_path), "--threads", "1"]) == 1
    assert "one class for each image, and the model gives logits [B, 11, 20, 20]" in capsys.readouterr().err


def hub_rows(**columns):
    features = datasets.Features({name: datasets.Image() for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def test_hugging_face_data_sets_with_a_column_of_masks(tmp_path):
    masks = [Image.fromarray(blocks(number)) for number in range(3)]
    pictures = [Image.fromarray(np.stack([20 * blocks(number)] * 3, -1)) for number in range(3)]
    expected = torch.stack([torch.from_numpy(blocks(number).astype(np.int64))[:, 2:10] for number in range(3)])
    rows = hub_rows(annotation=masks, image=pictures)
    step = transform(8, crop_pct=1.0)
    data = open_data(rows, step, num_classes=10)
    assert (data.dense, data.classes, data.size) == (True, 10, 3)
    assert torch.equal(read(data)[1], expected)
    streamed = open_data(rows.to_iterable_dataset(), step)
    assert torch.equal(torch.cat([maps for _, maps in streamed.batches(2, samples=3)]), expected)
    rows.save_to_disk(tmp_path / "saved")
    assert torch.equal(read(open_data(tmp_path / "saved", step))[1], expected)
    with pytest.raises(TokenPruneError, match="row 0: its annotation has class"):
        read(open_data(rows, step, num_classes=2))
    labelled = rows.add_column("label", [0, 1, 0]).cast_column("label", datasets.ClassLabel(names=["x", "y"]))
    assert not open_data(labelled, step).dense, "class labels go before masks"
