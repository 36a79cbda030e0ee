"""The denoisers of the small diffusion models, and what they are conditioned on."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.digits import NUM_CLASSES
from tokenprune.evals.drawn_digits import IMAGE_SIZE

DIT, UNET = "dit-digits", "unet-digits"
CHECKPOINTS = {DIT: "dit_digits.safetensors", UNET: "unet_digits.safetensors"}
UNCONDITIONAL = NUM_CLASSES
"""The label of no digit in particular."""

PLACES = 3
PROMPT_TOKENS = 4
# Start, digits, rows and columns of the picture's thirds, and the word for "anything".
VOCABULARY = 1 + NUM_CLASSES + 2 * PLACES + 1


def dit(**sizes: Any) -> nn.Module:
    """An untrained `DiTTransformer2DModel` in eval mode: 6 blocks of width 96 over 18 x 18 patches of 2 x 2 pixels.

    model(images [B, 3, 36, 36], timestep=[B] in [0, 1000], class_labels=[B] in 0..10).sample is [B, 3, 36, 36].
    `sizes` replaces arguments of the class.
    """
    from diffusers import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel(
        **{
            "num_attention_heads": 3,
            "attention_head_dim": 32,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 6,
            "sample_size": IMAGE_SIZE,
            "patch_size": 2,
            "num_embeds_ada_norm": NUM_CLASSES,
            **sizes,
        }
    )
    # As the paper initialises (Peebles and Xie, 2023, section 3.2): every block starts as the identity.
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    denoiser: nn.Module = model.eval()
    return denoiser


def unet(**sizes: Any) -> nn.Module:
    """An untrained `UNet2DConditionModel` in eval mode: 36 x 36 pixels without attention, and four stacks of three
    transformer blocks of width 48 at 18 x 18, which are 71% of its multiply-adds.

    model(images [B, 3, 36, 36], timestep [B] in [0, 1000], encoder_hidden_states [B, 4, 18]).sample is
    [B, 3, 36, 36]; `prompts` makes the last. `sizes` replaces arguments of the class.
    """
    from diffusers import UNet2DConditionModel

    model: nn.Module = UNet2DConditionModel(
        **{
            "sample_size": IMAGE_SIZE,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 48),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 3),
            "attention_head_dim": 3,  # diffusers' name for the number of heads
            "cross_attention_dim": VOCABULARY,
            "norm_num_groups": 8,
            "use_linear_projection": True,
            **sizes,
        }
    )
    return model.eval()


def prompts(labels: Tensor, centres: Tensor | None = None, size: int = IMAGE_SIZE) -> Tensor:
    """What the U-Net reads, [B, 4, 18], one-hot words: start, digit, row and column of the third that it lies in.

    labels: [B], UNCONDITIONAL for any digit. centres: [B, 2] in pixels of a picture of `size`, None for anywhere.
    """
    anything = VOCABULARY - 1
    words = torch.full((len(labels), PROMPT_TOKENS), anything, dtype=torch.long, device=labels.device)
    words[:, 0] = 0
    words[:, 1] = torch.where(labels == UNCONDITIONAL, anything, 1 + labels)
    if centres is not None:
        third = (centres.to(labels.device) * PLACES / size).long().clamp(0, PLACES - 1)
        words[:, 2:] = 1 + NUM_CLASSES + third + torch.tensor([0, PLACES], device=labels.device)
    return nn.functional.one_hot(words, VOCABULARY).float()


def untrained(name: str) -> nn.Module:
    """The denoiser called `name` with weights drawn from the global generator.

    Raises TokenPruneError for a name that is not known.
    """
    if name not in CHECKPOINTS:
        raise TokenPruneError(f"no diffusion model is called {name!r}; known: {', '.join(CHECKPOINTS)}")
    return dit() if name == DIT else unet()


def predict(
    model: nn.Module, images: Tensor, timestep: Tensor, labels: Tensor, centres: Tensor | None = None
) -> Tensor:
    """The velocity [B, 3, S, S] that either denoiser gives for `images` at `timestep` [B]; `centres` as in `prompts`,
    which a DiT does not see."""
    if hasattr(model, "transformer_blocks"):
        output: Tensor = model(images, timestep=timestep, class_labels=labels).sample
    else:
        words = prompts(labels, centres, images.shape[-1]).to(images.dtype)
        output = model(images, timestep, encoder_hidden_states=words).sample
    return output
