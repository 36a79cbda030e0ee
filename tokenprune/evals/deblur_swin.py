"""The small restoration network of windows that the package ships: it sharpens what :mod:`tokenprune.evals.local_blur`
has blurred."""

from __future__ import annotations

from importlib import resources

import torch
from torch import Tensor, nn
from torch.nn import functional

CHECKPOINT = "deblur_swin.safetensors"
PATCH_SIZE = 2
WINDOW_SIZE = 4
WIDTH = 48
HEADS = 4
MLP_RATIO = 2.0
DEPTHS = (4, 4)
REACH = 2
"""Pixels around its own that the embedding of a patch sees."""

IMAGE_SIZE = 192


class Patches(nn.Module):
    """Patches of PATCH_SIZE pixels a side with REACH around them, embedded: [B, 3, H, W] to [B, h, w, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = (IMAGE_SIZE, IMAGE_SIZE)
        self.grid_size = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)
        self.proj = nn.Conv2d(3, WIDTH, PATCH_SIZE + 2 * REACH, stride=PATCH_SIZE, padding=REACH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x - 0.5).permute(0, 2, 3, 1)


class DeblurSwin(nn.Module):
    """timm's Swin blocks at one resolution, between an embedding and a linear map to what is added to the pixels.

    Images [B, 3, H, W] in [0, 1], with sides that are multiples of PATCH_SIZE, to restored ones.
    """

    def __init__(self) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformerStage

        self.patch_embed = Patches()
        self.layers = nn.Sequential(
            *(
                SwinTransformerStage(
                    WIDTH,
                    WIDTH,
                    self.patch_embed.grid_size,
                    depth,
                    downsample=False,
                    num_heads=HEADS,
                    window_size=WINDOW_SIZE,
                    always_partition=True,
                    dynamic_mask=True,
                    mlp_ratio=MLP_RATIO,
                )
                for depth in DEPTHS
            )
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3 * PATCH_SIZE**2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.head(self.norm(self.layers(self.patch_embed(x))))
        return x + functional.pixel_shuffle(tokens.permute(0, 3, 1, 2), PATCH_SIZE)


def deblur_swin(pretrained: bool = True) -> nn.Module:
    """The network in eval mode, fp32. With ``pretrained=False`` its weights are random, drawn from the global
    generator."""
    model = DeblurSwin()
    if pretrained:
        from safetensors.torch import load

        stored = load((resources.files("tokenprune.evals") / "checkpoints" / CHECKPOINT).read_bytes())
        model.load_state_dict(stored)
    return model.eval()
