"""What a caller gives a training: checked before anything is trained."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokenprune.calibration import checked_images
from tokenprune.errors import TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.evals.data import ImageData, Transform, open_data
from tokenprune.evals.transforms import input_size
from tokenprune.learned_parts import SUFFIX
from tokenprune.learning import Recipe
from tokenprune.registry import make_method


def check_output(output: object) -> None:
    """Raise TokenPruneError where it names no folder."""
    if output is None:
        return
    if not isinstance(output, (str, PathLike)) or not str(output):
        raise TokenPruneError(f"output must name a folder, got {output!r}; for example output='learned'")
    if Path(output).is_file() or Path(output).suffix == SUFFIX:
        raise TokenPruneError(f"output={str(output)!r} is the name of a file; name a folder, which holds several")


def check_written(options: dict[str, Any]) -> None:
    """What is learned says its options in JSON: raise before the training, not after it."""
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TokenPruneError(
                f"{name}={value!r} cannot be written beside what is learned: {error}; plain numbers, words, lists and"
                " tuples can"
            ) from error


def recipe_of(method: str, options: dict[str, Any]) -> tuple[bool, Recipe]:
    """Whether the model's own weights are all that is trained, and how the paper trains."""
    made = make_method(method, options)
    if made.learned is not None:
        return False, made.learned.recipe
    if made.tuning is not None:
        return True, made.tuning
    raise UnsupportedMethod(f"{method} learns nothing: patch(model, {method!r}, flops=0.6) works as it is")


def _head(model: nn.Module) -> object:
    classifier = getattr(model, "get_classifier", None)
    return None if classifier is None else classifier()


def labelled_images(source: object, model: nn.Module, transform: Transform | None, split: str | None) -> ImageData:
    """The images and labels of a training, under timm's training transform where pictures come without one.

    Raises:
        UnsupportedModel: the model has no classifier. TokenPruneError: images that are none, or without labels.
    """
    classes = getattr(model, "num_classes", None)
    if classes == 0 and isinstance(_head(model), nn.Identity):
        raise UnsupportedModel(
            f"{type(model).__name__} has no classifier, and its features are no logits that labels are compared with;"
            " make it with num_classes="
        )
    ready = isinstance(source, (ImageData, tuple, list, Tensor))
    if ready and (transform is not None or split is not None):
        given = "transform=" if transform is not None else f"split={split!r}"
        raise TokenPruneError(f"{given} is of pictures in files; images that are ready are taken as they are, without")
    if transform is not None and not callable(transform):
        raise TokenPruneError(f"transform={transform!r} must be a function from an RGB PIL image to a tensor [C, H, W]")
    if transform is None and not ready:
        from timm.data import create_transform, resolve_model_data_config

        untyped: Any = resolve_model_data_config
        transform = create_transform(**untyped(model, args={"input_size": input_size(model)}), is_training=True)
    data = open_data(source, transform, split=split, num_classes=classes)
    if isinstance(source, (tuple, list)) and not checked_images(source[0]).is_floating_point():
        raise TokenPruneError(f"images must be floating, as the model takes them, got {source[0].dtype}")
    if data.classes is None:
        raise TokenPruneError(
            f"{data.name} has no labels, which a training needs: a pair (images, labels), or a folder with a subfolder"
            " for each class"
        )
    if data.dense and data.classes == 0:
        raise TokenPruneError(
            f"{data.name} does not tell how many classes its masks have; let the model have num_classes"
        )
    return data
