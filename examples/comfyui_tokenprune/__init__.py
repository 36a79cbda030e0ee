"""A ComfyUI node: token merging around the self-attention of a UNet (ToMe for Stable Diffusion), by our kernels.

ComfyUI has model classes of its own, so `tokenprune.patch` knows none of them; the node goes through the hooks that
ComfyUI has around self-attention. Copy or link this folder into
ComfyUI/custom_nodes, install tokenprune in ComfyUI's environment, and put "Merge tokens (tokenprune)" between the
checkpoint loader and the sampler. Tested against a stand-in of ComfyUI's ModelPatcher.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedModel
from tokenprune.selection.windows import merge_into_windows


class MergeTokens:
    """Merges a share of the tokens into the first one of their 2 x 2 window that they are most like."""

    CATEGORY, FUNCTION, RETURN_TYPES = "model_patches", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        ratio = {"default": 0.5, "min": 0.01, "max": 0.75, "step": 0.01}
        # Blocks so many times smaller than the latents in each direction: SD has attention from 1 on, SDXL from 2 on.
        most = {"default": 2, "min": 1, "max": 8}
        return {"required": {"model": ("MODEL",), "ratio": ("FLOAT", ratio), "max_downsample": ("INT", most)}}

    def patch(self, model: Any, ratio: float, max_downsample: int) -> tuple[Any]:
        unet = model.get_model_object("diffusion_model")
        if not hasattr(unet, "input_blocks"):
            raise UnsupportedModel(f"{type(unet).__name__} is no UNet: ComfyUI calls no hook around its self-attention")

        def merge(x: Tensor, context: Tensor, value: Tensor | None, options: dict[str, Any]) -> tuple[Any, Any, Any]:
            levels = [tuple(-(-side // d) for side in options["original_shape"][-2:]) for d in (1, 2, 4, 8)]
            grid = next((level for level in levels if math.prod(level) == x.shape[1]), None)
            if grid is None or levels.index(grid) > math.log2(max_downsample) or context.shape[1] != x.shape[1]:
                return x, context, value
            origin = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
            record = AttentionRecord(x, origin, num_prefix_tokens=0, place=0, depth=1, grid=grid)
            reduction = merge_into_windows(None, record, math.ceil((1 - ratio) * x.shape[1]))
            options["tokenprune"] = reduction, x.shape[1]  # of this block's call alone
            return reduction(x), reduction(context), None if value is None else reduction(value)

        def unmerge(x: Tensor, options: dict[str, Any]) -> Tensor:
            reduction, tokens = options.pop("tokenprune", (None, 0))
            return x if reduction is None else reduction.unmerge(x, tokens)

        patched = model.clone()
        patched.set_model_attn1_patch(merge)
        patched.set_model_attn1_output_patch(unmerge)
        return (patched,)


NODE_CLASS_MAPPINGS = {"TokenpruneMergeTokens": MergeTokens}
NODE_DISPLAY_NAME_MAPPINGS = {"TokenpruneMergeTokens": "Merge tokens (tokenprune)"}
