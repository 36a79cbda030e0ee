import pytest
import torch
from PIL import Image

from tokenprune.errors import TokenPruneError
from tokenprune.evals.dinov2 import IMAGENET_MEAN, IMAGENET_STD, normalize
from tokenprune.evals.images import photographs
from tokenprune.evals.openclipart import FOLDERS, openclipart
from tokenprune.evals.sources import openclipart_data, photographs_data


def test_photographs_are_normalised_and_grouped():
    data = photographs_data(64, IMAGENET_MEAN, IMAGENET_STD)
    pictures, names = photographs(64)
    images, labels = next(data.batches(100))
    assert labels is None
    torch.testing.assert_close(images, normalize(pictures))
    same_group = data.groups[:, None] == data.groups[None]
    assert torch.equal(same_group, torch.tensor([[a == b for b in names] for a in names]))


def test_drawings_carry_their_split_and_classes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(256, (16 * 16 * 3,), generator=generator).tolist()
            name = "".join(chr(97 + int(digit)) for digit in f"{FOLDERS.index(folder)}{number}")
            Image.frombytes("RGB", (16, 16), bytes(pixels)).save(tmp_path / folder / f"{name}.png")
    data = openclipart_data(tmp_path, 32, (0.5,) * 3, (0.5,) * 3)
    images, labels = next(data.batches(1000))
    assert data.classes == len(FOLDERS)
    assert len(images) == len(labels) == len(data.groups) == len(data.is_test) == 4 * len(FOLDERS)
    drawings = openclipart(tmp_path, 32)
    assert torch.equal(labels, drawings.labels)
    assert torch.equal(data.is_test, drawings.is_test)
    assert float(images.min()) >= -1
    assert float(images.max()) <= 1


def test_missing_drawings_are_one_clear_error(tmp_path):
    with pytest.raises(TokenPruneError, match="openclipart-png"):
        openclipart_data(tmp_path, 32, (0.5,) * 3, (0.5,) * 3)
