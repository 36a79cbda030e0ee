"""Small models whose attention stays in windows, with discriminating weights."""

from __future__ import annotations

import torch
import zoo
from timm.models.hiera import Hiera
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

# Of patches of 2 pixels in windows of 3 x 2: 36 and 9 whole windows, and odd grids that need padding in either stage.
SIZES = ((36, 24), (38, 22))
DEPTHS = (2, 4)


def build(name: str = "v1", size: tuple[int, int] = SIZES[0], **options: object) -> nn.Module:
    """Two stages of 2 and 4 blocks, windows of 3 x 2 tokens, the same weights on each call."""
    cls = {"v1": SwinTransformer, "v2": SwinTransformerV2}[name]
    arguments: dict[str, object] = {
        "img_size": size,
        "patch_size": 2,
        "num_classes": 7,
        "embed_dim": 8,
        "depths": DEPTHS,
        "num_heads": (2, 4),
        "window_size": (3, 2),
        "drop_path_rate": 0.0,
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(**arguments).eval()
    zoo.randomise(model, seed=7)
    return model


def sam(size: tuple[int, int] = (44, 28), **options: object) -> nn.Module:
    """Five blocks, the one in the middle of the whole grid; windows of 3 x 3 on 11 x 7 tokens."""
    arguments: dict[str, object] = {
        **{"img_size": size, "patch_size": 4, "embed_dim": 16, "depth": 5, "num_heads": 2, "window_size": 3},
        **{"global_attn_indexes": (2,), "use_rel_pos": True, "neck_chans": 8, "num_classes": 5, "init_values": 1.0},
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformerSAM(**arguments).eval().double()
    zoo.randomise(model, 3)
    return model


def hiera(size: tuple[int, int] = (32, 48)) -> nn.Module:
    """Units of 4 x 4 and, pooled once, 2 x 2 tokens: two, a pooling and two blocks; then blocks of the whole grid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Hiera(
            **{"img_size": size, "embed_dim": 8, "num_classes": 5, "stages": (2, 3, 2, 1), "q_pool": 2},
            **{"mask_unit_size": (4, 4), "patch_kernel": (3, 3), "patch_stride": (2, 2), "patch_padding": (1, 1)},
            **{"mask_unit_attn": (True, True, False, False), "init_values": 1.0},
        )
    zoo.randomise(model.eval().double(), 3)
    return model


def images(size: tuple[int, int] = SIZES[0], batch: int = 2, seed: int = 0) -> Tensor:
    """[B, 3, H, W], image i the same in every batch, its corners of different contrast."""
    made = []
    for i in range(batch):
        generator = torch.Generator().manual_seed(100 * seed + i)
        contrast = torch.nn.functional.interpolate(torch.rand(1, 1, 4, 4, generator=generator), size=size)
        made.append(torch.randn(3, *size, generator=generator) * contrast[0])
    return torch.stack(made)
