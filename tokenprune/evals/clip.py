"""CLIP and its kin of transformers: images in the space of texts, and classes by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.errors import TokenPruneError
from tokenprune.evals.data import Transform

TEMPLATE = "a photo of a {}."
TEXTS = 64
"""Of a forward."""


class ImageTower(nn.Module):
    """The image side of a `CLIPModel`, `SiglipModel` or the like: pixel values [B, C, H, W] to features [B, D]."""

    num_classes = 0

    def __init__(self, clip: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.clip = clip
        self.pretrained_cfg = {"input_size": (3, *size)}

    def forward(self, images: Tensor) -> Tensor:
        clip: Any = self.clip
        return pooled(clip.get_image_features(pixel_values=images))


class ZeroShot(ImageTower):
    """Classes by the texts that name them: images [B, C, H, W] to logits [B, classes], the cosines of Radford et al.,
    "Learning Transferable Visual Models From Natural Language Supervision" (2021, section 3.1), times CLIP's scale.

    classes: [classes, D], of `class_features`.
    """

    def __init__(self, clip: nn.Module, size: tuple[int, int], classes: Tensor) -> None:
        super().__init__(clip, size)
        self.num_classes = len(classes)
        self.head = nn.Linear(classes.shape[1], len(classes), bias=False)
        untyped: Any = clip
        with torch.no_grad():
            self.head.weight.copy_(classes * untyped.logit_scale.exp())
        self.head.to(classes.device, classes.dtype)

    def get_classifier(self) -> nn.Module:
        """What makes logits of features."""
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(functional.normalize(super().forward(images), dim=-1))
        return logits


def pooled(output: Any) -> Tensor:
    """The features [B, D] of what get_image_features and get_text_features give, a tensor before transformers 5."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def load_clip(name: str) -> tuple[nn.Module, Any]:
    """Model and processor of a folder, or of a name on the Hugging Face hub, in eval mode.

    Raises TokenPruneError where they cannot be had, or have no features of images and texts.
    """
    try:
        from transformers import AutoModel, AutoProcessor
    except ImportError as error:
        raise ImportError("CLIP models need transformers: pip install 'tokenprune-torch[transformers]'") from error
    try:
        model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise TokenPruneError(f"{name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise TokenPruneError(f"{name} is a {type(model).__name__}, which puts no images and texts into one space")
    whole: nn.Module = model.eval()
    return whole, processor


def pixels(processor: Any) -> Transform:
    """From an RGB PIL image to what the processor makes of it, [C, H, W]."""

    def transform(picture: Any) -> Tensor:
        found: Tensor = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return found

    return transform


@torch.inference_mode()
def text_features(clip: Any, processor: Any, texts: Sequence[str]) -> Tensor:
    """Of texts, at most as long as the model reads: [N, D], normalised."""
    found, device = [], next(clip.parameters()).device
    # SigLIP was trained on texts filled up to its length; CLIP's do not change where filling is masked.
    padding = "max_length" if "siglip" in clip.config.model_type else True
    for start in range(0, len(texts), TEXTS):
        part = list(texts[start : start + TEXTS])
        inputs = processor(text=part, return_tensors="pt", padding=padding, truncation=True).to(device)
        found.append(functional.normalize(pooled(clip.get_text_features(**inputs)), dim=-1))
    return torch.cat(found)


def class_features(clip: Any, processor: Any, names: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> Tensor:
    """Of classes by name, the normalised mean over templates (section 3.1.4 of the paper): [classes, D].

    Raises TokenPruneError for no names, and for a template without `{}`.
    """
    if not names or not templates:
        raise TokenPruneError(f"{len(names)} class names and {len(templates)} templates: zero-shot needs one of each")
    for template in templates:
        if "{}" not in template:
            raise TokenPruneError(f"template {template!r} has no place {{}} for a class's name; such as {TEMPLATE!r}")
    texts = [template.replace("{}", name) for name in names for template in templates]
    features = text_features(clip, processor, texts)
    return functional.normalize(features.view(len(names), len(templates), -1).mean(1), dim=-1)
