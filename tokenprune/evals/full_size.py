"""Inception FID and CLIP score of pictures from full-size models, on machines that have the weights of the judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.ranks import ranks
from tokenprune.evals.reading import read_picture

CLIP_MODEL = "openai/clip-vit-large-patch14"
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures in `folder` and below, by name.

    Raises TokenPruneError where there are none.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise TokenPruneError(f"{folder} has no pictures ({', '.join(SUFFIXES)})")
    return files


def inception_fid(
    generated: str | Path, real: str | Path, *, weights: str | Path | None = None, device: str | None = None
) -> float:
    """Fréchet distance of two folders of pictures in Inception v3's features (Heusel et al., 2017), by torch-fidelity.

    weights: of its Inception, where they must not be downloaded. device: None for CUDA where there is one.

    Raises ImportError without torch-fidelity, TokenPruneError for a folder without pictures and where the weights
    cannot be had.
    """
    for folder in (generated, real):
        for path in picture_files(folder):
            read_picture(path)  # one that cannot be read would be told without its name
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError("Inception FID needs torch-fidelity: pip install 'tokenprune-torch[fid]'") from error
    options: dict[str, Any] = {"feature_extractor_weights_path": str(weights)} if weights is not None else {}
    try:
        found = torch_fidelity.calculate_metrics(
            input1=str(generated),
            input2=str(real),
            fid=True,
            samples_find_deep=True,
            cuda=torch.cuda.is_available() if device is None else torch.device(device).type == "cuda",
            verbose=False,
            **options,
        )
    except Exception as error:  # of weights that are none, whatever reads them raises
        raise TokenPruneError(
            f"torch-fidelity failed: {str(error).splitlines()[0]}; weights=FILE names Inception weights that are here"
        ) from error
    return float(found["frechet_inception_distance"])


def clip_score(
    pictures: Sequence[str | Path],
    prompts: Sequence[str],
    *,
    model: str = CLIP_MODEL,
    batch_size: int = 16,
    device: str | None = None,
) -> list[float]:
    """Cosine of each picture with its prompt in CLIP's space, at least 0 (Hessel et al., 2021, without its factor 2.5).

    model: a name on the Hugging Face hub, or a folder. device: None for CUDA where there is one.

    Raises ImportError without transformers, TokenPruneError for lists of different lengths and where the model cannot
    be had.
    """
    if len(pictures) != len(prompts):
        raise TokenPruneError(f"{len(pictures)} pictures and {len(prompts)} prompts: one prompt a picture is needed")
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise ImportError("CLIP score needs transformers: pip install transformers") from error
    try:
        clip: Any = CLIPModel.from_pretrained(model)
        processor: Any = CLIPProcessor.from_pretrained(model)
    except Exception as error:  # what is missing in a folder differs from class to class
        raise TokenPruneError(f"CLIP {model} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    clip.eval().to(device)

    def scored(start: int) -> list[float]:
        texts = list(prompts[start : start + batch_size])
        images = [read_picture(path) for path in pictures[start : start + batch_size]]
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True).to(device)
        with torch.inference_mode():
            output = clip(**inputs)
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        scores: list[float] = cosine.clamp(min=0).tolist()
        return scores

    with ranks() as processes:
        own = [scored(start) for start in processes.own(range(0, len(pictures), batch_size))]
        return processes.joined(own, lambda whole: [score for batch in whole for score in batch])
