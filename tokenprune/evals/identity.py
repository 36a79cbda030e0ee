"""What a data set is, told cheaply: digests by which whoever goes on with it later finds that it is another one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOOKED_AT = 16
"""Images, and maps of labels, that are read."""

MEASURED = 1024
"""Files whose size is asked for: on a network file system each takes its time."""


class Identified:
    """A data set that tells what it is, for whoever goes on with it later."""

    def identity(self) -> dict[str, Any]:
        """Facts by name, each a text or a list of such as are known."""
        raise NotImplementedError


def digest(texts: Iterable[object]) -> str:
    """Of their representations, one after the other."""
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{text!r}\n".encode())
    return found.hexdigest()


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced, from 0 on."""
    taken = min(count, most)
    return [number * count // taken for number in range(taken)]


def of_tensors(images: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Of images [N, C, H, W] and labels [N] or maps of them [N, h, w]: `LOOKED_AT` of the images, None for one that is
    not finite and so may be mended; all labels, or those images' maps."""
    chosen = evenly(len(images), LOOKED_AT)
    found: dict[str, Any] = {"images": [_of_tensor(images[i]) if images[i].isfinite().all() else None for i in chosen]}
    if labels is not None:
        found["labels"] = _of_tensor((labels if labels.ndim == 1 else labels[chosen]).long())
    return found


def of_files(names: Sequence[Path], labels: Sequence[int] = ()) -> dict[str, Any]:
    """Of files: their names below the folder that they have in common, wherever that is, the labels, and the sizes in
    bytes of `MEASURED` of them."""
    texts = [name.as_posix() for name in names]
    cut = len(os.path.commonpath(texts) if len(texts) > 1 else os.path.dirname(texts[0]))  # relative_to takes seconds
    return {
        "names of files": digest("/" + text[cut:].lstrip("/") for text in texts),
        "labels": digest(labels),
        "sizes of files": digest(_size(names[i]) for i in evenly(len(names), MEASURED)),
    }


def _of_tensor(x: Tensor) -> str:
    values = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"{x.dtype} {list(x.shape)} ".encode() + values.tobytes()).hexdigest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # reading it says why
        return -1
