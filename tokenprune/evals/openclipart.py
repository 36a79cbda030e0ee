"""Drawings in folders as a classification set: Debian's `openclipart-png` (public domain), or any such tree of PNGs."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/openclipart/png")
"""Where `apt install openclipart-png` unpacks it."""

FOLDERS = (
    "animals/birds",
    "animals/bugs",
    "animals/mammals",
    "buildings/homes",
    "computer/hardware",
    "food/beverages",
    "food/desserts",
    "food/fruit",
    "food/meats_and_eggs",
    "people/clothing",
    "plants",
    "recreation/games",
    "recreation/holiday",
    "recreation/music",
    "recreation/sports",
    "signs_and_symbols/flags",
    "tools/weapons",
    "transportation/roadsigns",
    "transportation/vehicles",
)
"""Folders of the Debian package with at least thirty drawings, folders below them included, of one kind of thing."""

_VARIANTS = {"bw", "simple", "outline", "black", "white", "color", "colour", "grey", "gray", "shaded", "md", "v"}
_MOST_PIXELS = 16_000_000  # the package has a few drawings of up to 600 million pixels, more than Pillow opens
_ALIKE = 0.9  # correlation of two thumbnails from which they count as one drawing


class Drawings(NamedTuple):
    """A labelled set of drawings and its split."""

    images: Tensor  # uint8, [n, 3, size, size]
    labels: Tensor  # int64, [n], an index into `classes`
    groups: Tensor  # int64, [n], equal for drawings that are variants of each other
    is_test: Tensor  # bool, [n]; no group has drawings on both sides
    classes: tuple[str, ...]


def openclipart(
    folder: Path | str = DEBIAN_FOLDER,
    size: int = 224,
    per_class: int = 50,
    seed: int = 0,
    test_share: float = 0.3,
    folders: Sequence[str] = FOLDERS,
) -> Drawings:
    """At most `per_class` drawings of each of `folders` below `folder`, on white, in squares of `size` pixels.

    Symbolic links (the package files some drawings twice), empty and huge drawings are left out. Variants of a
    drawing, by name (`pear`, `pear_01`, `pear_bw`) or by look, stay on one side of the split; about `test_share` of
    each class is for testing. Raises FileNotFoundError where a folder has no drawings.
    """
    chooser = random.Random(seed)
    images: list[Tensor] = []
    stems: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(folders):
        files = sorted(
            file
            for file in (Path(folder) / name).rglob("*.png")
            if not file.is_symlink() and _pixels(file) <= _MOST_PIXELS
        )
        if not files:
            raise FileNotFoundError(
                f"no drawings (*.png) in {Path(folder) / name}; `apt-get install openclipart-png` puts them into "
                f"{DEBIAN_FOLDER}, or name the folder in which the package is unpacked"
            )
        chooser.shuffle(files)
        taken = 0
        for file in files:
            if taken == per_class:
                break
            image = _on_white(file, size)
            if image is not None:
                images.append(image)
                stems.append(_drawing_name(file.stem))
                labels.append(label)
                taken += 1
    stacked = torch.stack(images)
    groups = _components(len(images), [*_same_name(stems), *_same_look(stacked)])
    is_test = _split(labels, groups, test_share, chooser)
    return Drawings(stacked, torch.tensor(labels), torch.tensor(groups), torch.tensor(is_test), tuple(folders))


def _pixels(file: Path) -> int:
    """Width times height, as the first chunk of a PNG has it."""
    with file.open("rb") as opened:
        header = opened.read(24)
    return int.from_bytes(header[16:20], "big") * int.from_bytes(header[20:24], "big")


def _on_white(file: Path, size: int) -> Tensor | None:
    """The drawing in the middle of a white square, its longer side `size` pixels: uint8, [3, size, size].

    Empty margins are cut off first (many drawings are a stamp on an empty page); None where nothing is left.
    """
    from PIL import Image, ImageChops

    with Image.open(file) as opened:
        drawing = opened.convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    rgb = page.convert("RGB")
    box = ImageChops.invert(rgb).getbbox()
    if box is None:
        return None
    rgb = rgb.crop(box)
    scale = size / max(rgb.size)
    width, height = (max(1, round(side * scale)) for side in rgb.size)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(rgb.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _drawing_name(stem: str) -> str:
    """`Pear_simple_bw-02` and `pear01` are both `pear`."""
    words = re.split(r"[^a-z]+", stem.lower())
    return " ".join(word for word in words if word and word not in _VARIANTS)


def _same_name(names: Iterable[str]) -> list[tuple[int, int]]:
    first: dict[str, int] = {}
    return [(first.setdefault(name, index), index) for index, name in enumerate(names) if name]


def _same_look(images: Tensor) -> list[tuple[int, int]]:
    """Pairs whose 32 x 32 grey thumbnails correlate: recoloured and slightly redrawn variants."""
    shrunk = torch.nn.functional.interpolate(images.float().mean(1, keepdim=True), size=(32, 32), mode="area")
    vectors = shrunk.flatten(1)
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(1, keepdim=True), dim=1)
    alike = (vectors @ vectors.T).triu(1) > _ALIKE
    return [(int(first), int(second)) for first, second in alike.nonzero().tolist()]


def _components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The smallest index of each item's connected component."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return [root(item) for item in range(count)]


def _split(labels: Sequence[int], groups: Sequence[int], test_share: float, chooser: random.Random) -> list[bool]:
    """Whole groups go to the test side, in random order, while their class has room there."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for item, group in enumerate(groups):
        members[group].append(item)
    room = {label: test_share * count for label, count in Counter(labels).items()}
    is_test = [False] * len(labels)
    for group in chooser.sample(sorted(members), len(members)):
        needed = Counter(labels[item] for item in members[group])
        if all(room[label] >= count for label, count in needed.items()):
            for item in members[group]:
                is_test[item] = True
            for label, count in needed.items():
                room[label] -= count
    return is_test
