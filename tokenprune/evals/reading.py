"""Pictures as files have them: errors that name the file, from whichever process reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tokenprune.errors import TokenPruneError

Batch = TypeVar("Batch")

PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def pictures_in(folder: Path) -> list[Path]:
    """The files of pictures in `folder` and below, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)


def read_picture(path: str | Path) -> Any:
    """The RGB PIL image at `path`.

    Raises TokenPruneError where there is none, or none that can be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return rgb(picture)
    except Exception as error:  # of a broken file, anything that a decoder trips over
        raise TokenPruneError(f"{path} is no picture that can be read: {error}") from error


def rgb(picture: Any) -> Any:
    """RGB on white where the picture has transparency: a transparent background is not black."""
    if picture.mode in ("RGBA", "LA") or "transparency" in picture.info:
        from PIL import Image

        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def from_workers(batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches` of a DataLoader, whose workers' errors are what they were there, without their traceback.

    Raises TokenPruneError where a worker has died.
    """
    try:
        yield from batches
    except TokenPruneError as error:
        raise TokenPruneError(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from error
    except (RuntimeError, ConnectionError, EOFError) as error:  # as it died beside a batch, or while it handed one over
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise TokenPruneError(
            f"a process that reads images has died, killed or out of memory: {reason}. Fewer workers take less memory,"
            " and with workers=0 this process reads"
        ) from error
