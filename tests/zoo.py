"""Every model of timm's plain-ViT modules: small enough to test them all, and at real size on the meta device."""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

MODULES = (
    "vision_transformer",
    "deit",
    "beit",
    "eva",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "cait",
    "naflexvit",
)
DEPTH, WIDTH, HEADS, PATCH = 4, 96, 4, 4
IMAGE = (5 * PATCH, 7 * PATCH)  # odd and not square, so that a transposed or square grid shows


def module_of(name: str) -> str:
    """The one of MODULES that lists `name`."""
    return next(module for module in MODULES if name in timm.list_models(module=module))


def names() -> list[str]:
    """All names, in the order of MODULES."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


def create(name: str) -> nn.Module:
    """The model in eval mode with shrunk depth, width, heads, patch and image and with discriminating weights.

    Block and attention class, prefix tokens, pooling, rotary and relative positions, LayerScale and norms are the
    name's own. Deterministic for a name; the global RNG is left as it was.
    """
    module = module_of(name)
    kwargs: dict[str, Any] = {
        "depth": DEPTH,
        "embed_dim": WIDTH,
        "num_heads": HEADS,
        "img_size": IMAGE,
        "patch_size": PATCH,
        "pretrained_cfg_overlay": {"input_size": (3, *IMAGE)},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))  # for what is left as initialised
        if module == "vision_transformer_hybrid":  # the real stems would outweigh four narrow blocks
            stem = ConvStem(depth=2, channels=16, stride=(2, 2), kernel_size=3, padding=1)
            kwargs.update(patch_size=1, embed_layer=partial(HybridEmbed, backbone=stem))
        elif module == "naflexvit":
            kwargs.update(pos_embed_grid_size=(4, 6))  # up to 128 x 128 otherwise
        elif "sapiens2" in name:
            # Full attention at both ends and grouped queries between, as at the real depth; the base model has none.
            middle = HEADS if "base" in name else HEADS // 2
            kwargs.update(num_kv_heads=(HEADS, middle, middle, HEADS))
        model = timm.create_model(name, **kwargs).eval()
    randomise(model, seed=zlib.crc32(name.encode()))
    return model


def meta(name: str) -> nn.Module:
    """The model in eval mode at its real size, without storage."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def inputs(model: nn.Module, batch: int = 2) -> Tensor:
    """[B, 3, H, W] images of the model's own input size on its device, the same ones on each call."""
    size = model.pretrained_cfg["input_size"]
    device = next(model.parameters()).device
    if device.type == "meta":
        return torch.empty(batch, *size, device=device)
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, so that no term of a block is an identity or too small to be missed.

    timm initialises LayerScale near zero, biases and relative positions at zero and attention close to uniform: a
    wrong adapter would pass there.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float) -> None:
        parameter.normal_(0, std, generator=generator)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "freqs":  # rotary frequencies: learned, but meaningful only as initialised
                continue
            if name.startswith("gamma") or (name == "weight" and parameter.ndim == 1):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and name == "weight":
                normal(parameter, parameter[0].numel() ** -0.5)
            elif parameter.ndim > 1:  # tokens, position and relative position tables
                normal(parameter, 1.0)
            else:  # biases and the lambdas of differential attention
                normal(parameter, 0.2)
    for module in model.modules():
        for rows in query_and_key_rows(module):
            rows.mul_(1.6)  # attention far from uniform


def query_and_key_rows(module: nn.Module) -> list[Tensor]:
    """The rows of this attention's (or parallel block's) own projections that make queries and keys."""
    if hasattr(module, "in_split"):
        mlp, q, k, _ = module.in_split
        return [module.in_proj.weight[mlp : mlp + q + k]]
    fused = [child.weight[: 2 * child.out_features // 3] for n, child in module.named_children() if n == "qkv"]
    return fused + [child.weight for n, child in module.named_children() if n in ("q_proj", "k_proj", "q", "k")]


# 2 per multiply-add; torch has no formula of its own for these.
SOLVERS = {
    torch.ops.aten.linalg_cholesky_ex: lambda matrix, *args, **kwargs: matrix[0] * matrix[1] ** 3 / 3,
    torch.ops.aten.cholesky_solve: lambda values, *args, **kwargs: 2 * values[0] * values[1] ** 2 * values[2],
}


def count(model: nn.Module, x: Tensor) -> FlopCounterMode:
    """torch's flop counter (2 per multiply-add) after one forward.

    Fused attention on a CPU counts as nothing, hence the math backend; with gradients off the counter trips over
    timm's attention pooling, hence on.
    """
    counter = FlopCounterMode(display=False, custom_mapping=SOLVERS)
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        model(x)
    return counter
