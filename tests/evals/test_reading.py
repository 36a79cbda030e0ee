"""Images that cannot be read, and workers that die: errors that name the file, in this process and out of workers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenprune.errors import TokenPruneError
from tokenprune.evals.data import ImageData, open_data
from tokenprune.evals.reading import from_workers


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.tensor(list(picture.resize((2, 2)).tobytes())).view(2, 2, 3).permute(2, 0, 1) / 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (50, 40), (60 * number, 5, 9)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", "half", "flipped"], ids=str)
def test_a_picture_that_cannot_be_read_is_named(workers: int, content: bytes | str, folder: Path) -> None:
    broken = folder / "2.png"
    whole = broken.read_bytes()
    flipped = whole[:45] + bytes([whole[45] ^ 255]) + whole[46:]
    broken.write_bytes({"half": whole[: len(whole) // 2], "flipped": flipped}.get(str(content), content))
    with pytest.raises(TokenPruneError) as caught:
        list(open_data(folder, to_tensor).batches(1, workers=workers))
    assert str(caught.value).startswith(f"{broken} is no picture that can be read: ")
    assert "Traceback" not in str(caught.value)


def test_a_row_that_holds_no_picture_is_named() -> None:
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}]})
    data = open_data(rows.cast_column("image", datasets.Image()), to_tensor)
    with pytest.raises(TokenPruneError, match="row 0 holds no picture that can be read"):
        list(data.batches(1))


class Dying(Dataset[tuple[Tensor, int]]):
    """Its third image takes its reader with it."""

    def __init__(self, how: int) -> None:
        self.how = how

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 2:
            os.kill(os.getpid(), self.how)
        return torch.zeros(3, 2, 2), 0


def test_a_worker_that_dies_ends_it_with_an_error() -> None:
    # In a process of its own: torch raises what a worker died of wherever the process that started it happens to be.
    code = (
        f"import sys, signal; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_reading import Dying, ImageData\n"
        "list(ImageData('dying', Dying(signal.SIGKILL), 4, 1).batches(1, workers=1))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    # Python's own print of it may be cut short by torch's handler for the same death, and is then the error's repr.
    assert re.search(r"TokenPruneError\W+a process that reads images has died.*workers=0", found.stderr)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_is_no_other_error(error: Exception) -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise error

    found = from_workers(batches())
    assert next(found) == 1
    with pytest.raises(TokenPruneError, match=r"has died, killed or out of memory: (\[Errno|EOFError).*workers=0"):
        next(found)


class Wrong(Dying):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise KeyError(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_users_own_data_is_left_as_it_is(workers: int) -> None:
    with pytest.raises(KeyError):
        list(ImageData("wrong", Wrong(0), 4, 1).batches(1, workers=workers))
