"""Photographs of which a part is out of focus, to be restored: the blur is known, its place is not.

Crops of photographs that come with scikit-image and scikit-learn. Within a random smooth outline a crop is blurred by a
Gaussian of SIGMA pixels, without noise but rounded to bytes, and elsewhere it is the photograph: a blur that can be
undone to a good part, by design. Crops of training, validation and test are of different photographs;
those of "more" are for what decides about windows, and the network has not seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Split = Literal["train", "more", "val", "test"]

SIGMA = 1.0
OUTLINE_CELLS = 3
"""Nodes a side of the noise, smoothly interpolated, whose highest values are the blurred part."""

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": ("astronaut", "brick", "coins", "grass", "gravel", "rocket"),
    "more": ("grace_hopper", "hubble_deep_field", "immunohistochemistry", "retina"),
    "val": ("camera",),
    "test": ("chelsea", "china", "coffee", "flower", "motorcycle"),
}
TEST_SHARES = (0.3, 0.5)
"""Of the area that is blurred."""


class Blurred(NamedTuple):
    """images: [N, 3, H, W] in [0, 1], blurred where mask [N, H, W] is true. sharp: the photographs, [N, 3, H, W].
    sources: the photograph of each."""

    images: Tensor
    sharp: Tensor
    mask: Tensor
    sources: tuple[str, ...]


def locally_blurred(
    split: Split | tuple[Split, ...],
    count: int,
    seed: int = 0,
    start: int = 0,
    *,
    size: int,
    shares: tuple[float, float] = TEST_SHARES,
) -> Blurred:
    """Crops number `start` and following of a seed, of `size` pixels a side; each depends on the seed and its number
    alone. split: one or several, of all of whose photographs they are. shares: least and most of the area that is
    blurred, drawn evenly between."""
    names = [name for one in ((split,) if isinstance(split, str) else split) for name in PHOTOGRAPHS[one]]
    drawn = [_draw(names, seed, number, size, shares) for number in range(start, start + count)]
    images, sharp, mask, sources = zip(*drawn, strict=True)
    return Blurred(torch.stack(images), torch.stack(sharp), torch.stack(mask), sources)


def _draw(
    names: Sequence[str], seed: int, number: int, size: int, shares: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, str]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)

    def below(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    name = names[below(len(names))]
    both = _sharp_and_blurred(name)
    top, left = (below(side - size + 1) for side in both.shape[2:])
    both = both[:, :, top : top + size, left : left + size]
    if below(2):
        both = both.flip(3)
    low, high = shares
    share = low + (high - low) * float(torch.rand((), generator=generator))
    mask = outline(size, share, generator)
    sharp, blurred = both[0], both[1]
    return torch.where(mask, blurred, sharp), sharp.clone(), mask, name


def outline(size: int, share: float, generator: torch.Generator) -> Tensor:
    """[size, size], true in that share of it, within smooth borders."""
    nodes = torch.randn(1, 1, OUTLINE_CELLS, OUTLINE_CELLS, generator=generator)
    field = functional.interpolate(nodes, (size, size), mode="bicubic", align_corners=True)[0, 0]
    edge = field.flatten().kthvalue(round((1 - share) * size * size)).values
    return field > edge


@cache
def _sharp_and_blurred(name: str) -> Tensor:
    """[2, 3, H, W] in [0, 1]."""
    picture = torch.from_numpy(_photograph(name).copy())
    if picture.ndim == 2:
        picture = picture[..., None].expand(-1, -1, 3)
    sharp = picture.permute(2, 0, 1).float()
    return torch.stack([sharp, blur(sharp[None])[0].round()]) / 255


def blur(images: Tensor) -> Tensor:
    """[N, C, H, W] under the Gaussian, mirrored at the borders."""
    reach = round(4 * SIGMA)
    weights = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * SIGMA**2))
    weights = (weights / weights.sum()).to(images)
    planes = functional.pad(images.flatten(0, 1)[:, None], (reach,) * 4, mode="reflect")
    planes = functional.conv2d(functional.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.view(images.shape)


def _photograph(name: str) -> Any:
    from skimage import data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        return load_sample_image(f"{name}.jpg")
    if name == "motorcycle":
        return data.stereo_motorcycle()[0]
    if name == "grace_hopper":
        from matplotlib import cbook, image

        return image.imread(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return getattr(data, name)()


def psnr(images: Tensor, sharp: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB within mask [N, H, W], of each of images [N, 3, H, W] in [0, 1], clamped to that
    first: [N]."""
    squares = (images.clamp(0, 1) - sharp).double().square().mean(1)
    errors = (squares * mask).sum((1, 2)) / mask.sum((1, 2))
    return -10 * errors.log10()
