"""The small vision transformer that the package ships, trained on :mod:`tokenprune.evals.digits`."""

from importlib import resources

from torch import nn

from tokenprune.evals.digits import IMAGE_SIZE, NUM_CLASSES

CHECKPOINT = "digits_vit.safetensors"
PATCH_SIZE = 8


def digits_vit(pretrained: bool = True) -> nn.Module:
    """A stock timm VisionTransformer in eval mode, fp32: 10 blocks of width 96, 3 heads, 100 patches of 8 x 8 pixels
    and a class token. Images [B, 3, 80, 80], normalised as :func:`~tokenprune.evals.digits.normalise` does, to logits
    [B, 10]. With ``pretrained=False`` its weights are random, drawn from the global generator.
    """
    import timm

    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=96,
        depth=10,
        num_heads=3,
        num_classes=NUM_CLASSES,
    )
    if pretrained:
        from safetensors.torch import load

        stored = load((resources.files("tokenprune.evals") / "checkpoints" / CHECKPOINT).read_bytes())
        # Stored in half precision to stay small; copying into the model's parameters makes it fp32 again.
        model.load_state_dict(stored)
    return model.eval()
