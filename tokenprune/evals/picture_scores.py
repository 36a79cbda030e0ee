"""How far pictures are from others: PSNR, SSIM and LPIPS of pairs, Fréchet distance of sets in a model's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.evals.fidelity import observe
from tokenprune.evals.frechet import bootstrap_frechet, gaussian
from tokenprune.evals.full_size import picture_files
from tokenprune.evals.generation import psnr
from tokenprune.evals.models import LoadedModel
from tokenprune.evals.ranks import ranks
from tokenprune.evals.reading import read_picture
from tokenprune.evals.stats import Interval

NETS = {"alex": ("AlexNet", "alexnet"), "squeeze": ("SqueezeNet1_1", "squeezenet1_1"), "vgg": ("VGG16", "vgg16")}
BATCH = 16


def pair_scores(pictures: str | Path, reference: str | Path, *, lpips: str | None = None) -> dict[str, Tensor]:
    """PSNR (dB, at most 58.9), SSIM and, by the network `lpips` (alex, squeeze or vgg), LPIPS of the pictures of equal
    name in two folders: {name: [N]}, in the order of the names. Several processes share them out.

    Raises TokenPruneError for folders that do not hold the same names, pictures of different sizes, and where the
    weights of LPIPS are not on this machine.
    """
    first, second = (picture_files(folder) for folder in (pictures, reference))
    roots = (Path(pictures), Path(reference))
    both = zip((first, second), roots, strict=True)
    names = [[str(path.relative_to(root).with_suffix("")) for path in files] for files, root in both]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))[:3]
        raise TokenPruneError(f"{pictures} and {reference} hold pictures of different names: {', '.join(odd)}")
    distance = None if lpips is None else lpips_of(lpips)

    def scored(pair: tuple[Path, Path]) -> dict[str, float]:
        one, other = (picture_tensor(path) for path in pair)
        if one.shape != other.shape:
            raise TokenPruneError(f"{pair[0]} has another size than {pair[1]}: {_size(one)} and {_size(other)}")
        found = {"psnr": psnr(one, other).item(), "ssim": ssim(one, other).item()}
        return found if distance is None else {**found, "lpips": distance(one, other).item()}

    with ranks() as processes:
        own = [scored(pair) for pair in processes.own(list(zip(first, second, strict=True)))]
        return processes.joined(
            own, lambda whole: {name: torch.tensor([one[name] for one in whole]) for name in whole[0]}
        )


def picture_tensor(path: Path) -> Tensor:
    """The picture in a file, [1, 3, H, W] in [0, 1]."""
    from torchvision.transforms.functional import to_tensor

    found: Tensor = to_tensor(read_picture(path))
    return found[None]


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity [N] (Wang et al., 2004) of pictures [N, C, H, W] in [0, 1], by torchmetrics: its Gaussian
    window around every pixel, mirrored at the edges.

    Raises TokenPruneError for pictures smaller than its window of 11 pixels.
    """
    image = _torchmetrics()
    if min(pictures.shape[-2:]) < 11:
        raise TokenPruneError(f"SSIM compares windows of 11 x 11 pixels, and a picture is {_size(pictures)}")
    found: Tensor = image.structural_similarity_index_measure(pictures, reference, reduction="none", data_range=1.0)
    return found.reshape(len(pictures))


def lpips_of(net: str) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (Zhang et al., 2018) by torchmetrics, which brings its heads: of pictures [N, 3, H, W] in [0, 1] to [N].

    Raises TokenPruneError where torchvision's weights of the network `net` are not on this machine.
    """
    if net not in NETS:
        raise TokenPruneError(f"LPIPS by {net!r} is unknown; {', '.join(NETS)} are known")
    import torchvision

    enum, builder = NETS[net]
    url = str(getattr(torchvision.models, f"{enum}_Weights").DEFAULT.url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        raise TokenPruneError(
            f"LPIPS by {net} needs the weights of torchvision's {builder}, {path.name}, and they are not here: download"
            f" {url} to {path} (TORCH_HOME names another place), or leave LPIPS out"
        )
    _torchmetrics()
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    model: Any = LearnedPerceptualImagePatchSimilarity(net, normalize=True)

    def distance(pictures: Tensor, reference: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                pairs = zip(torch.split(pictures, 1), torch.split(reference, 1), strict=True)
                return torch.stack([model(one, other) for one, other in pairs])
        except RuntimeError as error:
            raise TokenPruneError(f"LPIPS by {net} cannot compare pictures of {_size(pictures)}: {error}") from error

    return distance


def frechet_of_folders(
    generated: str | Path, real: str | Path, extractor: LoadedModel, *, batch_size: int = BATCH, seed: int = 0
) -> Interval:
    """Fréchet distance of two folders of pictures in the features that enter the extractor's classifier, with a 95%
    interval over the generated ones. Several processes share them out.

    Raises TokenPruneError for a folder of fewer than two pictures, and for an extractor without features [B, D].
    """
    sets = [picture_files(folder) for folder in (generated, real)]
    with ranks() as processes:
        both = [_features(files, extractor, batch_size, processes.own) for files in sets]
        whole = list[Tensor]()  # on rank 0
        for own in both:
            processes.joined(own, lambda parts: whole.append(torch.cat(parts)))
        return processes.from_main(lambda: bootstrap_frechet(whole[0], gaussian(whole[1]), seed=seed)[0])


def _features(
    files: Sequence[Path], extractor: LoadedModel, batch_size: int, own: Callable[[Sequence[Any]], list[Any]]
) -> list[Tensor]:
    """Of this process's batches, [B, D] each."""
    weight, found = next(extractor.model.parameters()), []
    for batch in own([files[start : start + batch_size] for start in range(0, len(files), batch_size)]):
        images = torch.stack([extractor.transform(read_picture(path)) for path in batch])
        with torch.inference_mode():
            features = observe(extractor.model, images.to(weight)).features
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise TokenPruneError(f"{extractor.name} gives no features [B, D] to compare; take an image classifier")
        found.append(features.float().cpu())
    return found


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"


def _torchmetrics() -> Any:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise ImportError(f"SSIM and LPIPS need {error.name}: pip install 'tokenprune-torch[evals]'") from error
    return image
