"""The small Swin transformer that the package ships, trained on larger canvases of :mod:`tokenprune.evals.digits`."""

from importlib import resources

from torch import nn

from tokenprune.evals.digits import NUM_CLASSES

CHECKPOINT = "digits_swin.safetensors"
IMAGE_SIZE = 96
PATCH_SIZE = 3
WINDOW_SIZE = 4


def digits_swin(pretrained: bool = True) -> nn.Module:
    """A stock timm SwinTransformer in eval mode, fp32: patches of 3 x 3 pixels, windows of 4 x 4 tokens, three stages
    of 2, 2 and 4 blocks of width 32, 64 and 128 with 64, 16 and 4 windows. Images [B, 3, 96, 96], normalised as
    :func:`~tokenprune.evals.digits.normalise` does, to logits [B, 10]. With ``pretrained=False`` its weights are
    random, drawn from the global generator.
    """
    import timm

    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        window_size=WINDOW_SIZE,
        embed_dim=32,
        depths=(2, 2, 4),
        num_heads=(2, 4, 8),
        drop_path_rate=0.0,
        num_classes=NUM_CLASSES,
    )
    if pretrained:
        from safetensors.torch import load

        stored = load((resources.files("tokenprune.evals") / "checkpoints" / CHECKPOINT).read_bytes())
        # Stored in half precision to stay small; copying into the model's parameters makes it fp32 again.
        model.load_state_dict(stored)
    return model.eval()
