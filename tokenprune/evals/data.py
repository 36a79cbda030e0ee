"""Images to evaluate on: tensors, a folder, or a Hugging Face data set, read in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenprune.errors import TokenPruneError
from tokenprune.evals.hf_data import Rows, columns_of, is_saved, open_rows, reader_of, streamed
from tokenprune.evals.identity import Identified, of_files, of_tensors
from tokenprune.evals.mask_data import MaskedPictures, masked_files
from tokenprune.evals.ranks import ALONE, Ranks
from tokenprune.evals.reading import PICTURE_SUFFIXES, from_workers, pictures_in, read_picture, rgb
from tokenprune.evals.streams import UNKNOWN, UNLABELLED, Stream, is_tars, webdataset

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ImageData:
    """Images [C, H, W] with class numbers (-1 for none), or where `dense` with maps [h, w] of them.

    classes: how many, None where there are no labels, 0 where maps of them do not tell. groups: [size], equal for
    images that are not independent (crops of one photograph). is_test: [size], bool, which images are classified by the
    others as their nearest neighbours. names: of the classes, where they are known.
    """

    name: str
    items: Dataset[tuple[Tensor, Any]] | Stream
    size: int
    classes: int | None
    groups: Tensor | None = None
    is_test: Tensor | None = None
    dense: bool = False
    names: tuple[str, ...] | None = None

    def batches(
        self,
        batch_size: int,
        *,
        samples: int | None = None,
        seed: int = 0,
        workers: int = 0,
        processes: Ranks = ALONE,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images [B, C, H, W], labels [B] or None) of the `chosen` images, once each, in their order; of several
        `processes` each has whole batches of its own."""
        chosen = self.chosen(samples, seed)
        # The loader draws a seed for its workers; from a generator of its own, not from the caller's.
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.items, Stream):
            part = self.items.batches(batch_size, len(chosen), processes.rank, processes.count)
            loader = DataLoader(part, batch_size, num_workers=min(1, workers), generator=generator)
        else:
            own = processes.own([batch.tolist() for batch in torch.split(chosen, batch_size)])
            loader = DataLoader(self.items, batch_sampler=own, num_workers=workers, generator=generator)
        for images, labels in from_workers(loader):
            yield images, None if self.classes is None else labels

    def by_number(self) -> Dataset[tuple[Tensor, Any]]:
        """The images with random access, which a training needs.

        Raises TokenPruneError where they come as a stream.
        """
        if isinstance(self.items, Stream):
            raise TokenPruneError(f"{self.name} comes as a stream, without random access; here use a folder of images")
        return self.items

    def chosen(self, samples: int | None, seed: int) -> Tensor:
        """Indices, ascending: all, or `samples` of them drawn by `seed`, of a stream the first ones."""
        if isinstance(self.items, Stream):
            if samples is None and self.size == UNKNOWN:
                raise TokenPruneError(
                    f"{self.name} is a stream that does not tell its length; name samples= (--samples)"
                )
            return torch.arange(min(samples or self.size, self.size))
        return chosen(self.size, samples, seed)


def chosen(size: int, samples: int | None, seed: int) -> Tensor:
    """Indices, ascending: all of `size`, or `samples` of them drawn by `seed`."""
    if samples is None:
        return torch.arange(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, samples)].sort().values


def open_data(
    source: object, transform: Transform | None = None, *, split: str | None = None, num_classes: int | None = None
) -> ImageData:
    """Images from `source`:

    - images [N, C, H, W], or a pair of them and labels [N] or maps of labels [N, h, w], ready for the model;
    - a folder: one subfolder a class (ImageFolder), in the order of their names, or pictures without labels;
    - a folder with `images` and `masks` of equal names (also `annotations` or `labels`, with folders of splits in both,
      as ADE20K has them), or with the folders of Pascal VOC as torchvision unpacks them: maps of classes;
    - a folder with the tars of webdataset, `KEY.jpg` and `KEY.cls` (`split`: of their _info.json, or a brace pattern);
    - the name of a Hugging Face data set, a folder with one (save_to_disk, Parquet), or one that is loaded (`split`:
      validation or test by default); `stream:NAME` reads it as it comes. Of two image columns one called
      mask, annotation, label or the like is of masks, where there is no column of class labels.

    The tars and a stream have no random access: of these `samples` takes the first ones.

    transform: from an RGB PIL image to [C, H, W], needed for all but tensors. num_classes: of the model; folders that
    are named by WordNet ids are numbered as in ImageNet-1k where it is 1000.

    Raises TokenPruneError where nothing is found, a picture has no mask, or the classes cannot be those of the model.
    """
    if isinstance(source, ImageData):
        return source
    if isinstance(source, (Tensor, tuple, list)):
        return _from_tensors(source)
    if transform is None:
        raise TokenPruneError("pictures need a transform to the model's input; pass transform=")
    folder = Path(source) if isinstance(source, (str, Path)) and Path(source).is_dir() else None
    if folder is not None and is_tars(folder):
        data = _from_tars(folder, transform, split, num_classes)
    elif folder is not None and (files := masked_files(folder, split)) is not None:
        return ImageData(
            folder.resolve().name,
            MaskedPictures(files, transform, num_classes),
            len(files),
            num_classes or 0,
            dense=True,
        )
    elif folder is not None and not is_saved(folder):
        if split is not None:
            raise TokenPruneError(f"split={split!r}: {folder} holds pictures alone and no splits; name a folder of one")
        data = _from_folder(folder, transform, num_classes)
    else:
        data = _from_hugging_face(source, transform, split, num_classes)
    if num_classes and not data.dense and data.classes is not None and data.classes != num_classes:
        raise TokenPruneError(f"{data.name} has {data.classes} classes and the model {num_classes}: they cannot match")
    return data


class _Tensors(Identified, Dataset[tuple[Tensor, Any]]):
    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if self.labels is None:
            return self.images[index], UNLABELLED
        label = self.labels[index]
        return self.images[index], label.long() if label.ndim else int(label)

    def identity(self) -> dict[str, Any]:
        """What they are, for whoever goes on with them later."""
        return of_tensors(self.images, self.labels)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Picture files without labels."""

    def __init__(self, files: Sequence[Path], transform: Transform) -> None:
        self.files, self.transform = files, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(read_picture(self.files[index])), UNLABELLED


class _Files(Identified, Dataset[tuple[Tensor, int]]):
    def __init__(self, files: Sequence[tuple[Path, int]], transform: Transform) -> None:
        self.files, self.transform = files, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return self.transform(read_picture(path)), label

    def identity(self) -> dict[str, Any]:
        """What they are, for whoever goes on with them later."""
        return of_files([path for path, _ in self.files], [label for _, label in self.files])


def _from_tensors(source: Any) -> ImageData:
    if not isinstance(source, Tensor) and not (len(source) == 2 and isinstance(source[0], Tensor)):
        raise TokenPruneError(f"a {type(source).__name__} is to be a pair of two tensors: (images, labels)")
    images, given = (source, None) if isinstance(source, Tensor) else source
    if len(images) == 0:
        raise TokenPruneError("no images: a tensor of none was given")
    labels = None if given is None else _class_numbers(given, len(images))
    classes = None if labels is None else int(labels.max()) + 1
    dense = labels is not None and labels.ndim > 1
    return ImageData("tensors", _Tensors(images, labels), len(images), classes, dense=dense)


def _class_numbers(labels: Any, images: int) -> Tensor:
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # words, or rows of different lengths
        raise TokenPruneError(f"labels are to be numbers of classes, in one tensor: {error}") from error
    if numbers.ndim == 0 or len(numbers) != images:
        raise TokenPruneError(f"{images} images and {len(numbers) if numbers.ndim else 1} labels")
    if numbers.is_floating_point() or numbers.is_complex():
        raise TokenPruneError(f"labels are to be whole numbers of classes, got {numbers.dtype}")
    return numbers


def _from_folder(folder: Path, transform: Transform, num_classes: int | None) -> ImageData:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and pictures_in(entry))
    if not classes:
        files = [(path, UNLABELLED) for path in pictures_in(folder)]
        if not files:
            raise TokenPruneError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
        return ImageData(folder.resolve().name, _Files(files, transform), len(files), None)
    numbers = {entry.name: number for number, entry in enumerate(classes)}
    count = len(classes)
    if num_classes == 1000 and count < 1000:
        numbers, count = _imagenet_numbers(numbers), 1000
    files = [(path, numbers[entry.name]) for entry in classes for path in pictures_in(entry)]
    told = tuple(numbers) if len(numbers) == count else None
    return ImageData(folder.resolve().name, _Files(files, transform), len(files), count, names=told)


def _imagenet_numbers(names: dict[str, int]) -> dict[str, int]:
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    known = {name: number for number, name in enumerate(info.label_names())}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise TokenPruneError(
            f"{len(names)} class folders for a model of 1000 classes: {unknown[0]} is no ImageNet-1k WordNet id"
        )
    return {name: known[name] for name in names}


def _from_tars(folder: Path, transform: Transform, split: str | None, num_classes: int | None) -> ImageData:
    reader, size, classes = webdataset(folder, split)

    def read(row: tuple[Any, int]) -> tuple[Tensor, int]:
        return transform(rgb(row[0])), row[1]

    # The last classes of the model may be rare ones.
    return ImageData(folder.name, Stream(folder.name, lambda: reader, read), size, max(classes, num_classes or 0))


def _from_hugging_face(source: Any, transform: Transform, split: str | None, num_classes: int | None) -> ImageData:
    import datasets

    rows = open_rows(str(source), split) if isinstance(source, (str, Path)) else source
    columns, name = columns_of(rows), rows.info.dataset_name or "data set"

    read = reader_of(columns, transform, num_classes)
    classes, dense = columns.classes if columns.mask is None else num_classes or 0, columns.mask is not None
    if isinstance(rows, datasets.IterableDataset):
        return ImageData(name, *streamed(rows, columns, read), classes, dense=dense, names=columns.names)
    return ImageData(name, Rows(rows, read, columns.label), len(rows), classes, dense=dense, names=columns.names)
