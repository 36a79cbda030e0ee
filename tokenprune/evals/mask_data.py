"""Pictures with a mask each, the class number of every pixel: in two folders, or in two columns of a data set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenprune.errors import TokenPruneError
from tokenprune.evals.identity import Identified, of_files
from tokenprune.evals.reading import pictures_in, read_picture, rgb
from tokenprune.evals.segmentation import IGNORED

Transform = Callable[[Any], Tensor]

PICTURES = "images"
MASKS = ("masks", "annotations", "labels")
"""Folders of masks beside one of pictures."""

VOC_PICTURES, VOC_MASKS, VOC_LISTS = "JPEGImages", "SegmentationClass", Path("ImageSets") / "Segmentation"
"""Pascal VOC's folders, as torchvision unpacks them."""

COLUMNS = (*MASKS, "mask", "annotation", "label", "segmentation_mask", "semantic_mask", "segmentation")
"""What image columns of masks are called."""

SPLITS = ("validation", "val", "test")
"""Which is taken where none is named, the first that there is."""

MOVING = ("Resize", "ResizeKeepRatio", "CenterCrop", "CenterCropOrPad", "TrimBorder")
POINTWISE = ("ToTensor", "MaybeToTensor", "PILToTensor", "MaybePILToTensor", "ConvertImageDtype", "Normalize")
"""Steps of a model's transform that a mask takes too, and that it does not."""


def masked_files(folder: Path, split: str | None) -> list[tuple[Path, Path]] | None:
    """Pictures and their masks, by name, of a folder that has them as `images` and `masks` (or `annotations`, `labels`)
    or as Pascal VOC; None where it has not. split: of VOC's lists, or of the folders within both.

    Raises TokenPruneError for a picture without a mask, and a split that there is not.
    """
    if (folder / VOC_PICTURES).is_dir() and (folder / VOC_MASKS).is_dir():
        return _of_voc(folder, split)
    masks = next((folder / name for name in MASKS if (folder / name).is_dir()), None)
    if masks is None or not (folder / PICTURES).is_dir():
        return None
    pictures = folder / PICTURES
    within = sorted(entry.name for entry in pictures.iterdir() if entry.is_dir() and (masks / entry.name).is_dir())
    if split is not None or any(name in within for name in SPLITS):
        part = _split(split, within, folder)
        pictures, masks = pictures / part, masks / part
    files = pictures_in(pictures)
    if not files:
        raise TokenPruneError(f"{pictures} holds no pictures")
    known = {path.relative_to(masks).with_suffix(""): path for path in pictures_in(masks)}
    return _paired([(path, known.get(path.relative_to(pictures).with_suffix(""))) for path in files], masks)


def _of_voc(folder: Path, split: str | None) -> list[tuple[Path, Path]]:
    lists = sorted(path.stem for path in (folder / VOC_LISTS).glob("*.txt"))
    names = (folder / VOC_LISTS / f"{_split(split, lists, folder)}.txt").read_text(encoding="utf-8").split()
    pictures, masks = folder / VOC_PICTURES, folder / VOC_MASKS
    found = [(pictures / f"{name}.jpg", masks / f"{name}.png") for name in names]
    absent = next((picture for picture, _ in found if not picture.is_file()), None)
    if not found or absent is not None:
        raise TokenPruneError(f"{folder}: its list names no pictures" if absent is None else f"{absent} is not there")
    return _paired([(picture, mask if mask.is_file() else None) for picture, mask in found], masks)


def _split(asked: str | None, there: Sequence[str], folder: Path) -> str:
    found = asked if asked is not None else next((name for name in SPLITS if name in there), None)
    if found not in there:
        raise TokenPruneError(f"{folder} has no split {asked or 'of its own'}, only {', '.join(there) or 'none'}")
    assert found is not None
    return found


def _paired(files: Sequence[tuple[Path, Path | None]], masks: Path) -> list[tuple[Path, Path]]:
    without = [picture for picture, mask in files if mask is None]
    if without:
        more = f", nor for {len(without) - 1} more" if len(without) > 1 else ""
        raise TokenPruneError(f"{masks} has no mask for {without[0]}{more}")
    return [(picture, mask) for picture, mask in files if mask is not None]


class MaskedPictures(Identified, Dataset[tuple[Tensor, Tensor]]):
    """Files of pictures and masks as images [C, H, W] and maps of classes [H, W]."""

    def __init__(self, files: Sequence[tuple[Path, Path]], transform: Transform, num_classes: int | None) -> None:
        self.files, self.pair = files, MaskedTransform(transform, num_classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, mask = self.files[index]
        return self.pair(read_picture(picture), _opened(mask), str(mask))

    def identity(self) -> dict[str, Any]:
        """What they are, for whoever goes on with them later."""
        return of_files([file for pair in self.files for file in pair])


class MaskedTransform:
    """A picture and its mask, of one size, as the model takes them: image [C, H, W], and the class number [H, W] of
    what each of its pixels was nearest to, -1 beyond the picture's edge.

    transform: of torchvision's or timm's steps, from an RGB PIL image to [C, H, W]. num_classes: of the model, None
    where it does not say.

    Raises TokenPruneError for a transform of other steps, and of a mask for one of another size, of colours in place of
    numbers, and of a class that the model does not have.
    """

    def __init__(self, transform: Transform, num_classes: int | None) -> None:
        self.transform, self.num_classes, self.steps = transform, num_classes, _steps_of_masks(transform)

    def __call__(self, picture: Any, mask: Any, where: str) -> tuple[Tensor, Tensor]:
        from PIL import Image

        numbers = np.asarray(mask)
        if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
            raise TokenPruneError(f"{where} is of mode {mask.mode}: a mask has one channel, of whole class numbers")
        if mask.size != picture.size:
            raise TokenPruneError(
                f"{where} is of {mask.size[0]} x {mask.size[1]} pixels and its picture of"
                f" {picture.size[0]} x {picture.size[1]}"
            )
        if self.num_classes and (wrong := self._beyond(numbers)) is not None:
            raise TokenPruneError(f"{where} has class {wrong}, and the model tells {self.num_classes} apart, from 0")
        # One more than the class, so that the nothing that a step pads with is none.
        moved = Image.fromarray(numbers.astype(np.int32) + 1)
        for step in self.steps:
            moved = step(moved)
        return self.transform(rgb(picture)), torch.from_numpy(np.asarray(moved).astype(np.int64) - 1)

    def _beyond(self, numbers: Any) -> int | None:
        """A class that the model does not have."""
        assert self.num_classes is not None
        beyond = numbers >= self.num_classes
        if self.num_classes <= IGNORED:
            beyond &= numbers != IGNORED
        return int(numbers[beyond].max()) if beyond.any() else None


def _steps_of_masks(transform: Any) -> list[Callable[[Any], Any]]:
    """The steps that move pixels, by the nearest one."""
    from torchvision.transforms import InterpolationMode

    steps = []
    for step in getattr(transform, "transforms", [transform]):
        kind = type(step).__name__
        if kind in POINTWISE:
            continue
        if kind not in MOVING:
            raise TokenPruneError(
                f"{kind} of the model's transform is not known, so a mask cannot be moved as a picture is; give"
                " tensors, (images, maps)"
            )
        own = copy.copy(step)
        if hasattr(own, "interpolation"):
            own.interpolation = InterpolationMode.NEAREST
        if hasattr(own, "fill"):
            own.fill = 0
        steps.append(own)
    return steps


def _opened(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as mask:
            mask.load()
            return mask
    except Exception as error:  # of a broken file, anything that a decoder trips over
        raise TokenPruneError(f"{path} is no mask that can be read: {error}") from error
