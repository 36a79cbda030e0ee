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
from tokenprune.evals.ranks import ALONE, Ranks

Transform = Callable[[Any], Tensor]
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
UNLABELLED = -1


@dataclass(frozen=True)
class ImageData:
    """Images [C, H, W] with class numbers (-1 for none), or where `dense` with maps [h, w] of them.

    classes: how many, None where there are no labels. groups: [size], equal for images that are not independent (crops
    of one photograph). is_test: [size], bool, which images are classified by the others as their nearest neighbours.
    """

    name: str
    items: Dataset[tuple[Tensor, Any]]
    size: int
    classes: int | None
    groups: Tensor | None = None
    is_test: Tensor | None = None
    dense: bool = False

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
        batches = [part.tolist() for part in torch.split(self.chosen(samples, seed), batch_size)]
        # The loader draws a seed for its workers; from a generator of its own, not from the caller's.
        generator = torch.Generator().manual_seed(seed)
        own = processes.own(batches)
        loader = DataLoader(self.items, batch_sampler=own, num_workers=workers, generator=generator)
        for images, labels in loader:
            yield images, None if self.classes is None else labels

    def chosen(self, samples: int | None, seed: int) -> Tensor:
        """Indices, ascending: all, or `samples` of them drawn by `seed`."""
        if samples is None:
            return torch.arange(self.size)
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        return order[: max(1, samples)].sort().values


def open_data(
    source: object, transform: Transform | None = None, *, split: str | None = None, num_classes: int | None = None
) -> ImageData:
    """Images from `source`:

    - images [N, C, H, W], or a pair of them and labels [N] or maps of labels [N, h, w], ready for the model;
    - a folder: one subfolder a class (ImageFolder), in the order of their names, or pictures without labels;
    - the name of a Hugging Face data set, or one that is loaded (`split`: validation or test by default).

    transform: from an RGB PIL image to [C, H, W], needed for the last two. num_classes: of the model; folders that are
    named by WordNet ids are numbered as in ImageNet-1k where it is 1000.

    Raises TokenPruneError where nothing is found, or where the classes cannot be those of the model.
    """
    if isinstance(source, ImageData):
        return source
    if isinstance(source, Tensor) or (isinstance(source, (tuple, list)) and isinstance(source[0], Tensor)):
        return _from_tensors(source)
    if transform is None:
        raise TokenPruneError("pictures need a transform to the model's input; pass transform=")
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        data = _from_folder(Path(source), transform, num_classes)
    else:
        data = _from_hugging_face(source, transform, split)
    if num_classes and data.classes is not None and data.classes != num_classes:
        raise TokenPruneError(f"{data.name} has {data.classes} classes and the model {num_classes}: they cannot match")
    return data


class _Tensors(Dataset[tuple[Tensor, Any]]):
    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if self.labels is None:
            return self.images[index], UNLABELLED
        label = self.labels[index]
        return self.images[index], label if label.ndim else int(label)


class _Files(Dataset[tuple[Tensor, int]]):
    def __init__(self, files: Sequence[tuple[Path, int]], transform: Transform) -> None:
        self.files, self.transform = files, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[index]
        with Image.open(path) as picture:
            return self.transform(_rgb(picture)), label


class _HuggingFace(Dataset[tuple[Tensor, int]]):
    def __init__(self, rows: Any, transform: Transform, image: str, label: str | None) -> None:
        self.rows, self.transform, self.image, self.label = rows, transform, image, label

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.transform(_rgb(row[self.image])), UNLABELLED if self.label is None else int(row[self.label])


def _from_tensors(source: Any) -> ImageData:
    images, labels = (source, None) if isinstance(source, Tensor) else source
    if len(images) == 0:
        raise TokenPruneError("no images: a tensor of none was given")
    if labels is not None and len(labels) != len(images):
        raise TokenPruneError(f"{len(images)} images and {len(labels)} labels")
    classes = None if labels is None else int(labels.max()) + 1
    dense = labels is not None and labels.ndim > 1
    return ImageData("tensors", _Tensors(images, labels), len(images), classes, dense=dense)


def _from_folder(folder: Path, transform: Transform, num_classes: int | None) -> ImageData:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and _pictures(entry))
    if not classes:
        files = [(path, UNLABELLED) for path in _pictures(folder)]
        if not files:
            raise TokenPruneError(f"{folder} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
        return ImageData(folder.name, _Files(files, transform), len(files), None)
    numbers = {entry.name: number for number, entry in enumerate(classes)}
    count = len(classes)
    if num_classes == 1000 and count < 1000:
        numbers, count = _imagenet_numbers(numbers), 1000
    files = [(path, numbers[entry.name]) for entry in classes for path in _pictures(entry)]
    return ImageData(folder.name, _Files(files, transform), len(files), count)


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


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _from_hugging_face(source: Any, transform: Transform, split: str | None) -> ImageData:
    import datasets

    if isinstance(source, (str, Path)):
        try:
            names = datasets.get_dataset_split_names(str(source))
            chosen = split or next((name for name in ("validation", "test") if name in names), names[0])
            rows = datasets.load_dataset(str(source), split=chosen)
        except Exception as error:
            # The hub client raises a dozen unrelated classes; what the user needs to know is the same for all.
            raise TokenPruneError(f"{source} is no folder, and no data set that can be loaded: {error}") from error
    else:
        rows = source
    features = getattr(rows, "features", None)
    if features is None:
        raise TokenPruneError(f"cannot read images from a {type(source).__name__}")
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images:
        raise TokenPruneError(f"the data set has no image column, only {', '.join(features)}")
    classes = features[labels[0]].num_classes if labels else None
    items = _HuggingFace(rows, transform, images[0], labels[0] if labels else None)
    return ImageData(rows.info.dataset_name or "data set", items, len(rows), classes)


def _rgb(picture: Any) -> Any:
    """RGB on white where the picture has transparency: a transparent background is not black."""
    if picture.mode in ("RGBA", "LA") or "transparency" in picture.info:
        from PIL import Image

        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")
