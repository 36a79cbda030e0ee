"""What each method keeps of a photograph, for the page that explains the methods.

    python -m tokenprune.evals.method_pictures --output docs/images/methods

Each is a row: the photograph, then its patches at the first, a middle and the last place of a DINOv2 ViT-S/14.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.viz import contact_sheet, place_panels

FLOPS = 0.6
PIXELS = 160
PLACES = 3
LARGEST = 25_000
"""Bytes of a picture."""
QUALITIES = (80, 70, 60, 50, 40)


def draw(model: nn.Module, inputs: Tensor, picture: Tensor, folder: Path) -> dict[str, str]:
    """A .jpg in `folder` for each method that works on `model` as it is, at `FLOPS` of the multiply-adds or, where a
    method has to be calibrated for that, by its defaults; returns what each was drawn at.

    inputs: [1, C, H, W] as the model takes them. picture: the same image for the eye, [3, H, W] in [0, 1].
    """
    small = functional.interpolate(picture[None], (PIXELS, PIXELS), mode="bilinear", antialias=True)[0]
    drawn: dict[str, str] = {}
    for info in tokenprune.methods(model):
        for budget in ({"flops": FLOPS}, {}):
            try:
                with tokenprune.patched(model, info.name, **budget):
                    title = f"{info.name}, flops={FLOPS}" if budget else f"{info.name}, its defaults"
                    panels = place_panels(model, inputs, small, title, places=PLACES, pixels=PIXELS)
            except TokenPruneError:  # it acts in training alone, or has to learn or to be calibrated first
                continue
            _save(contact_sheet([panels]), folder / f"{info.name}.jpg")
            drawn[info.name] = title.split(", ")[1]
            break
    return drawn


def _save(sheet: object, path: Path) -> None:
    for quality in QUALITIES:
        sheet.save(path, quality=quality, optimize=True, progressive=True)  # type: ignore[attr-defined]
        if path.stat().st_size <= LARGEST:
            return
    raise TokenPruneError(f"{path} has more than {LARGEST} bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws all methods into the folder."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.method_pictures", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    from tokenprune.evals.dinov2 import dinov2_small, normalize
    from tokenprune.evals.images import photographs

    images = photographs().images[:1]  # an astronaut's portrait
    torch.manual_seed(0)
    for name, budget in draw(dinov2_small(), normalize(images), images[0] / 255, options.output).items():
        print(f"{name}: {budget}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
