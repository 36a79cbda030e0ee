"""Random timm models of 7 x 5 patches and 12 blocks whose attention is far from uniform."""

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

GRID = (7, 5)
PATCHES = GRID[0] * GRID[1]
SHAPE = {
    "img_size": (4 * GRID[0], 4 * GRID[1]),
    "patch_size": 4,
    "num_classes": 10,
    "embed_dim": 48,
    "depth": 12,
    "num_heads": 3,
    "mlp_ratio": 2.0,
}
VARIANTS = {
    "class_token": lambda: VisionTransformer(**SHAPE),
    "registers": lambda: VisionTransformer(
        **SHAPE, reg_tokens=4, init_values=1.0, qk_norm=True, no_embed_class=True, scale_attn_norm=True
    ),
    "mean_pool": lambda: VisionTransformer(**SHAPE, class_token=False, global_pool="avg", init_values=1.0),
    "mean_pool_registers": lambda: VisionTransformer(**SHAPE, class_token=False, reg_tokens=3, global_pool="avg"),
    "rotary": lambda: Eva(
        **SHAPE,
        attn_type="rope",
        use_rot_pos_emb=True,
        qk_norm=True,
        num_reg_tokens=1,
        init_values=1.0,
        global_pool="token",
    ),
}


def build(variant: str, seed: int = 0) -> nn.Module:
    """A model in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VARIANTS[variant]()
        for name, parameter in model.named_parameters():
            if "q_norm" in name and name.endswith("weight"):
                nn.init.uniform_(parameter, 1.5, 3.0)
            elif ("norm" in name and name.endswith("weight")) or "gamma" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif "norm" in name or "token" in name or "pos_embed" in name or name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
            else:
                fan_in = parameter[0].numel()
                gain = 1.6 if "qkv" in name else 1.0
                nn.init.normal_(parameter, std=gain * fan_in**-0.5)
    return model.eval()


def images(batch: int = 3, seed: int = 0) -> Tensor:
    """Random images [B, 3, 28, 20], each with a bright rectangle of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(batch, 3, *SHAPE["img_size"], generator=generator)
    for i in range(batch):
        x[i, :, 3 * i : 3 * i + 11, 2 * i : 2 * i + 9] += 1.5
    return x


def build_with_twins(variant: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model of at most one prefix token and three images whose patches 2 i and 2 i + 1 are equal in everything."""
    model, x = build(variant, seed), images(seed=seed)
    rows, columns = GRID
    patches = x.reshape(3, 3, rows, 4, columns, 4).permute(2, 4, 0, 1, 3, 5).reshape(PATCHES, 3, 3, 4, 4)
    patches[1::2] = patches[0:-1:2]
    x = patches.reshape(rows, columns, 3, 3, 4, 4).permute(2, 3, 0, 4, 1, 5).reshape(x.shape)
    with torch.no_grad():
        prefix = model.num_prefix_tokens
        model.pos_embed[:, prefix + 1 :: 2] = model.pos_embed[:, prefix:-1:2].clone()
    return model, x
