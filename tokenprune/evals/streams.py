"""Images that come one after the other and cannot be asked for by number: streamed data sets, webdataset's tars."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from tokenprune.errors import TokenPruneError

UNLABELLED = -1
UNKNOWN = sys.maxsize
"""Size of a stream that does not tell it."""
TAR_PICTURES = (".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Stream:
    """rows: begins the stream anew. read: of a row the image [C, H, W] and its label."""

    name: str
    rows: Callable[[], Iterable[Any]]
    read: Callable[[Any], tuple[Tensor, Any]]

    def batches(self, batch_size: int, count: int, rank: int, ranks: int) -> IterableDataset[Any]:
        """The first `count` images, of them those of every `ranks`-th batch from `rank` on; others are not decoded."""
        return _Part(self, batch_size, count, rank, ranks)


@dataclass(frozen=True)
class _Part(IterableDataset[tuple[Tensor, Any]]):
    stream: Stream
    batch_size: int
    count: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        number = -1
        for number, row in enumerate(islice(self.stream.rows(), self.count)):
            if number // self.batch_size % self.ranks == self.rank:
                yield self.stream.read(row)
        if number + 1 < self.count:
            raise TokenPruneError(f"{self.stream.name} ended after {number + 1} of {self.count} images")


def is_tars(folder: Path) -> bool:
    """Whether `folder` holds tars, and webdataset is to read them."""
    return any(folder.glob("*.tar"))


def webdataset(folder: Path, split: str | None) -> tuple[Any, int, int]:
    """timm's reader of the tars in a folder, the number of images in them, and of classes.

    split: one of the folder's `_info.json`, or a brace pattern of tars; None for all of them, by name.

    Raises TokenPruneError for tars that cannot be read, hold no pictures, or pictures without a label, which
    that reader skips.
    """
    try:
        import webdataset as _  # noqa: F401
        from timm.data.readers import create_reader
    except ImportError as error:
        raise ImportError(f"tars need {error.name}: pip install 'tokenprune-torch[evals]'") from error
    try:
        if split is None:
            split = "::".join(path.name for path in sorted(folder.glob("*.tar")))
        reader: Any = create_reader("wds/", str(folder), split, is_training=False)
        reader.dist_rank, reader.dist_num_replicas = 0, 1  # who reads what is decided here, an image at a time
        pictures, labels = _contents([folder / name for name in reader.split_info.filenames])
    except (RuntimeError, OSError, tarfile.TarError) as error:
        raise TokenPruneError(f"the tars of {folder} cannot be read: {error}") from error
    if not pictures:
        raise TokenPruneError(f"the tars of {folder} hold no pictures ({', '.join(TAR_PICTURES)})")
    if len(labels) != pictures:
        raise TokenPruneError(
            f"the tars of {folder} hold {pictures} pictures and {len(labels)} labels (KEY.cls); pictures without"
            " labels are read from a folder"
        )
    return reader, pictures, max(labels) + 1


def _contents(tars: Iterable[Path]) -> tuple[int, list[int]]:
    """How many pictures there are, and all labels."""
    pictures, labels = 0, list[int]()
    for path in tars:
        with tarfile.open(path) as opened:
            for member in opened:
                if member.name.lower().endswith(TAR_PICTURES):
                    pictures += 1
                elif member.name.endswith(".cls"):
                    told = opened.extractfile(member)
                    assert told is not None
                    labels.append(int(told.read()))
    return pictures, labels
