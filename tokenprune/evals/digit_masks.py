"""Where the digit on a cluttered canvas is, and which: segmentation by a small head on the shipped ViT's patch tokens.

Canvases are those of :mod:`tokenprune.evals.digits`, of which the lines and the strips of other digits are background.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals import segmentation
from tokenprune.evals.digits import IMAGE_SIZE, NUM_CLASSES, Split, inked_digit_pictures, normalise
from tokenprune.evals.digits_vit import digits_vit

CHECKPOINT = "digit_masks.safetensors"
CELL = 4
"""Pixels a side of what has one class: half a patch."""

INKED = 0.25
"""Share of a cell that is ink, above which it is the digit's."""

CLASSES = 1 + NUM_CLASSES
WIDTH = 96
HIDDEN = 64


class MaskHead(nn.Module):
    """A convolution and a transposed one: patch features [B, 96, h, w] to logits [B, 11, 2 h, 2 w], of the background
    and of each digit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, HIDDEN, 3, padding=1)
        self.upconv = nn.ConvTranspose2d(HIDDEN, CLASSES, 4, stride=2, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.upconv(nn.functional.gelu(self.conv(features)))
        return logits


def masked_digits(split: Split, count: int, seed: int = 0, start: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised images [count, 3, 80, 80] and the class of each cell [count, 20, 20]: 0, or 1 more than the digit."""
    pictures, labels, inked = inked_digit_pictures(split, count, seed, start)
    side = IMAGE_SIZE // CELL
    shares = torch.from_numpy(inked).view(count, side, CELL, side, CELL).mean((2, 4))
    return normalise(pictures), torch.where(shares > INKED, torch.from_numpy(labels)[:, None, None] + 1, 0)


def patch_features(model: Any, images: Tensor) -> Tensor:
    """The normalised output of a timm model's last block on images [B, 3, H, W], as a map [B, C, h, w]: what a
    token-reduced model restores."""
    [features] = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
    found: Tensor = features
    return found


def mask_head() -> MaskHead:
    """The head with the weights that the package ships, fp32, in eval mode."""
    from safetensors.torch import load

    head = MaskHead()
    head.load_state_dict(load((resources.files("tokenprune.evals") / "checkpoints" / CHECKPOINT).read_bytes()))
    return head.eval()


class DigitMasks(nn.Module):
    """The shipped ViT, read without pooling, and the head: images [B, 3, 80, 80] to logits [B, 11, 20, 20]."""

    num_classes = CLASSES

    def __init__(self) -> None:
        super().__init__()
        vit: Any = digits_vit()
        vit.reset_classifier(0, "")
        self.vit, self.head = vit, mask_head()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(patch_features(self.vit, images))
        return logits


def overlaps(predicted: Tensor, truth: Tensor) -> Tensor:
    """`tokenprune.evals.segmentation.overlaps` of two maps of these classes [N, h, w]: [N, 2, 11]."""
    return segmentation.overlaps(predicted, truth, CLASSES)
