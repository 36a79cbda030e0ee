"""Images of a Hugging Face data set: from the hub, from a folder on disk, or as a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from tokenprune.errors import TokenPruneError
from tokenprune.evals.identity import Identified, digest
from tokenprune.evals.mask_data import COLUMNS as MASK_COLUMNS
from tokenprune.evals.mask_data import MaskedTransform, Transform
from tokenprune.evals.reading import rgb
from tokenprune.evals.streams import UNKNOWN, UNLABELLED, Stream

STREAM = "stream:"

Reader = Callable[[Any], tuple[Tensor, Any]]


def is_saved(folder: Path) -> bool:
    """Whether `folder` holds a data set as `datasets` writes one: by save_to_disk, or in Parquet files."""
    names = ("dataset_info.json", "dataset_dict.json")
    return any((folder / name).is_file() for name in names) or any(folder.rglob("*.parquet"))


def open_rows(source: str, split: str | None) -> Any:
    """The rows of `source`, a folder or a name on the hub, read as they are asked for where it begins with `stream:`;
    split: validation, else test by default.

    Raises TokenPruneError where they cannot be loaded.
    """
    import datasets

    streaming, name = source.startswith(STREAM), source.removeprefix(STREAM)
    try:
        if not streaming and any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
            return found[split or _preferred(list(found))] if isinstance(found, datasets.DatasetDict) else found
        chosen = split or _preferred(datasets.get_dataset_split_names(name))
        return datasets.load_dataset(name, split=chosen, **({"streaming": True} if streaming else {}))
    except Exception as error:
        # The hub client raises a dozen unrelated classes; what the user needs to know is the same for all.
        raise TokenPruneError(f"{name} is no folder, and no data set that can be loaded: {error}") from error


def _preferred(names: list[str]) -> str:
    return next((name for name in ("validation", "test") if name in names), names[0])


@dataclass(frozen=True)
class Columns:
    """Where the image and its label, or its mask, are, and the names of the classes: None without."""

    image: str
    label: str | None
    names: tuple[str, ...] | None
    mask: str | None = None

    @property
    def classes(self) -> int | None:
        """How many."""
        return None if self.names is None else len(self.names)


def columns_of(rows: Any) -> Columns:
    """Of rows of `datasets`.

    Raises TokenPruneError for anything else, and for rows without images.
    """
    import datasets

    if not isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        raise TokenPruneError(f"cannot read images from a {type(rows).__name__}")
    features = rows.features
    if features is None:
        raise TokenPruneError("the stream does not tell its columns; give it features=, as datasets.load_dataset takes")
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images:
        raise TokenPruneError(f"the data set has no image column, only {', '.join(features)}")
    image = next((name for name in images if name not in MASK_COLUMNS), images[0])
    if labels:
        return Columns(image, labels[0], tuple(features[labels[0]].names))
    return Columns(image, None, None, next((name for name in images if name in MASK_COLUMNS and name != image), None))


def reader_of(columns: Columns, transform: Transform, num_classes: int | None) -> Reader:
    """From a row to the image [C, H, W] and its label, or where the columns have a mask its map [H, W] of classes.

    transform: from an RGB PIL image to [C, H, W]. num_classes: of the model, None where it does not say.
    """
    if columns.mask is not None:
        pair, mask = MaskedTransform(transform, num_classes), columns.mask
        return lambda row: pair(row[columns.image], row[mask], f"its {mask}")
    label = columns.label
    return lambda row: (transform(rgb(row[columns.image])), UNLABELLED if label is None else int(row[label]))


class Rows(Identified, Dataset[tuple[Tensor, Any]]):
    """rows: with random access. read: see `reader_of`. label: the column of class labels, if any."""

    def __init__(self, rows: Any, read: Reader, label: str | None = None) -> None:
        self.rows, self.read, self.label = rows, read, label

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        try:
            return self.read(self.rows[index])
        except TokenPruneError as error:
            raise TokenPruneError(f"row {index}: {error}") from error
        except Exception as error:  # of a broken row, anything that a decoder trips over
            raise TokenPruneError(f"row {index} holds no picture that can be read: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What they are, for whoever goes on with them later: all labels."""
        if self.label is None:
            return {}
        return {"labels": digest(self.rows.select_columns([self.label]).with_format(None)[:][self.label])}


def streamed(rows: Any, columns: Columns, read: Reader) -> tuple[Stream, int]:
    """The stream of rows that come one after the other, and how many there are, UNKNOWN where they do not tell."""
    import datasets

    splits, split = rows.info.splits or {}, str(rows.split)
    size = splits[split].num_examples if split in splits else UNKNOWN
    pictures = [name for name in (columns.image, columns.mask) if name is not None]
    encoded, decoder = rows, datasets.Image()
    for name in pictures:
        encoded = encoded.cast_column(name, datasets.Image(decode=False))

    def decoded(row: dict[str, Any]) -> tuple[Tensor, Any]:
        return read({**row, **{name: decoder.decode_example(row[name]) for name in pictures}})

    return Stream(rows.info.dataset_name or "the stream", lambda: encoded, decoded), size or UNKNOWN
