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
DEPTHS = (2, 4)
REACH = 2
"""Pixels around its own that the embedding of a patch sees."""

IMAGE_SIZE = 192
MEAN, STD = 0.5, 0.25


SIDE = PATCH_SIZE + 2 * REACH


def cosines() -> Tensor:
    """Filters [WIDTH, 3, SIDE, SIDE] of a cosine transform: all frequencies of the brightness, and the lowest of two
    colour differences."""
    steps = (torch.arange(SIDE) + 0.5) * torch.pi / SIDE
    rows = torch.cos(torch.arange(SIDE)[:, None] * steps)
    rows = rows / rows.norm(dim=1, keepdim=True)
    planes = torch.einsum("ui,vj->uvij", rows, rows).flatten(0, 1)
    rising = sorted(range(SIDE**2), key=lambda n: sum(divmod(n, SIDE)))
    colours = (WIDTH - SIDE**2) // 2
    red, blue = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([-0.5, -0.5, 1.0])
    of = [(torch.ones(3) / 3, range(SIDE**2)), *((axis, rising[:colours]) for axis in (red, blue))]
    return torch.stack([axis[:, None, None] * planes[n] for axis, numbers in of for n in numbers])


class Patches(nn.Module):
    """Patches of PATCH_SIZE pixels a side with REACH around them, embedded: [B, 3, H, W] to [B, h, w, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = (IMAGE_SIZE, IMAGE_SIZE)
        self.grid_size = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)
        self.proj = nn.Conv2d(3, WIDTH, SIDE, stride=PATCH_SIZE, padding=REACH)
        self.proj.weight.data = cosines()
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj((x - MEAN) / STD)
        return tokens.permute(0, 2, 3, 1)


class DeblurSwin(nn.Module):
    """timm's Swin blocks at one resolution. What they have added to a token says what is added to its pixels, in part
    as weights of its embedding, which has the contrast that their norms take away. So a window that all blocks pass
    through keeps its pixels, bit for bit.

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
        self.weigh = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(2 * WIDTH, 3 * PATCH_SIZE**2, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.patch_embed(x)
        added = self.layers(entered) - entered
        tokens = self.head(torch.cat([added, self.weigh(added) * entered], -1))
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
