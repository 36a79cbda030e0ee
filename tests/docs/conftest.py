"""A folder with what the documented commands name, and everything in it small; timed work runs once."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune.evals import (
    adapt_swin,
    denoiser_speed,
    dinov2,
    generation,
    generation_curves,
    images,
    lvlm_speed,
    openclipart,
    region_quality,
    side_by_side,
    throughput,
    train_adawpt,
    train_deblur,
    train_diffusion,
    train_digits,
    train_lvlm,
    train_masks,
    train_reader,
    train_swin,
)

PACKAGE = Path(tokenprune.__file__).parent
CHECKPOINTS, WEIGHTS = PACKAGE / "evals" / "checkpoints", PACKAGE / "weights"

SMALL_VIT = {
    "img_size": 64,
    "embed_dim": 48,
    "num_heads": 3,
    "num_classes": 3,
    "pretrained_cfg_overlay": {"input_size": (3, 64, 64)},
}
# The models of timm that the pages name: built without a download, and with these sizes.
SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL_VIT,
    "vit_small_patch16_224": SMALL_VIT,
    "deit_small_patch16_224": SMALL_VIT,
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "num_heads": (1, 2, 4, 8), "num_classes": 3},
}
# Their settings that are no options: module, name, value.
SMALLER: list[tuple[Any, str, Any]] = [
    (generation, "REAL_IMAGES", 70),
    (generation_curves, "STEPS", 3),
    (denoiser_speed, "LEVELS", denoiser_speed.LEVELS[2:3]),
    (denoiser_speed, "MIDDLE", denoiser_speed.MIDDLE[1:]),
    (region_quality, "REAL_IMAGES", 70),
    (train_diffusion, "RECIPES", {name: train_diffusion.Recipe(1, 1, 1e-3) for name in train_diffusion.RECIPES}),
    *((train_diffusion, name, 2) for name in ("BATCH", "VALIDATION_IMAGES", "VALIDATE_EVERY", "SAVE_EVERY")),
    *((train_swin, name, 2) for name in ("LOG_EVERY", "BATCH", "VALIDATION_IMAGES", "TEST_IMAGES")),
    *((module, "TEST_IMAGES", 8) for module in (train_digits, train_masks, train_reader)),
    (train_digits, "VALIDATION_IMAGES", 8),
    (train_masks, "CANVASES", 16),
    (train_lvlm, "VALIDATION_SCENES", 2),
    *((train_deblur, name, 2) for name in ("LOG_EVERY", "SCALING_CROPS", "VALIDATION_CROPS", "TEST_CROPS", "BATCH")),
    *((train_adawpt, name, 2) for name in ("LOG_EVERY", "CALIBRATION_CROPS", "BATCH")),
    (train_adawpt, "GUIDED_STEPS", 1),
    *((adapt_swin, name, 2) for name in ("LOG_EVERY", "CANVASES", "BATCH")),
]


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What takes a while to write: a checkpoint of a Swin, and drawings in the folders of openclipart."""
    path, name = tmp_path_factory.mktemp("stored"), "swin_tiny_patch4_window7_224"
    save_file(timm.create_model(name, **SMALL[name]).state_dict(), path / "weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    for kind in openclipart.FOLDERS:
        (path / "drawings" / kind).mkdir(parents=True)
        for word in ("oak", "elm", "fir", "yew", "ash", "fig"):
            squares = torch.randint(256, (6, 6, 3), generator=generator, dtype=torch.uint8)
            drawing = Image.fromarray(squares.numpy()).resize((48, 48), Image.Resampling.NEAREST)
            drawing.save(path / "drawings" / kind / f"{word}_{kind.split('/')[-1]}.png")
    return path


@pytest.fixture(autouse=True)
def _package_stays() -> Iterator[None]:
    """No command or example writes over what the package ships."""
    before = shipped()
    yield
    assert shipped() == before


def shipped() -> dict[str, int]:
    """When each file of weights, and each record, was last written."""
    return {str(file): file.stat().st_mtime_ns for folder in (CHECKPOINTS, WEIGHTS) for file in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one: pictures, checkpoints and photographs by the names that the pages give them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / "cache"))
    for name in ("pictures", "imagenet/train", "imagenet/val"):
        for label in ("a", "b", "c"):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(4):
                picture = Image.effect_noise((70, 80), 30 + 20 * number).convert("RGB")
                picture.save(tmp_path / name / label / f"{number}.png")
    for name in ("photo.jpg", "cat.jpg"):
        Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / name)
    for name in ("dit", "unet"):  # copies, as commands train on in these folders
        (tmp_path / f"{name}-run").mkdir()
        for file in CHECKPOINTS.glob(f"{name}_digits.*"):
            shutil.copy(file, tmp_path / f"{name}-run")
    for one in stored.iterdir():
        (tmp_path / one.name).symlink_to(one)
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models, sets of images and trainings of a second or less."""
    create = timm.create_model

    def created(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        sizes = {} if "depth" in options or "depths" in options else SMALL.get(name, {})
        return create(name, pretrained=False, **{**sizes, **options})

    monkeypatch.setattr(timm, "create_model", created)
    compile_ = nn.Module.compile  # a graph as any, which no compiler then takes minutes for
    monkeypatch.setattr(nn.Module, "compile", lambda model, mode, **how: compile_(model, backend="eager", **how))
    monkeypatch.setattr(
        dinov2, "dinov2_small", lambda image_size=224: create("vit_small_patch14_dinov2", img_size=image_size).eval()
    )
    loads, squares = images._sources(), images._squares
    monkeypatch.setattr(images, "_sources", lambda: {name: loads[name] for name in ("astronaut", "camera")})
    monkeypatch.setattr(images, "_squares", lambda image: squares(image)[:1])
    for module, name, value in SMALLER:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(train_swin.train, "__defaults__", (train_swin.Recipe(((48, 1), (96, 1))),))
    tiny = train_lvlm.Recipe(1, 1, tower_batch=2, answer_batch=2, place_layer=1, place_from=1, colours_until=1)
    monkeypatch.setattr(train_lvlm.train, "__defaults__", (tiny,))
    monkeypatch.setattr(train_deblur.train, "__defaults__", (2,))
    monkeypatch.setattr(train_adawpt.train, "__defaults__", (2, None))
    monkeypatch.setattr(adapt_swin.train, "__defaults__", (2,))


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is timed in rounds runs once, and takes as long as its multiply-adds say: nothing here depends on how
    busy a machine is, and a search for a speed-up finds one."""
    taken = dict[int, tuple[Any, float]]()

    def sample(arm: Callable[[], object], repeats: int, device: torch.device, clock: Any = None) -> float:
        if id(arm) not in taken:
            compiled = getattr(getattr(arm, "func", None), "_compiled_call_impl", None) is not None
            counter = FlopCounterMode(display=False)  # under which nothing is compiled
            with contextlib.nullcontext() if compiled else counter:
                arm()
            taken[id(arm)] = arm, 1e-9 * (1 + counter.get_total_flops())
        return repeats * taken[id(arm)][1]

    monkeypatch.setattr(throughput, "sample", sample)
    monkeypatch.setattr(side_by_side, "sample", sample)
    monkeypatch.setitem(throughput.measure.__kwdefaults__, "warmup", 0)
    for module in (side_by_side, lvlm_speed):
        monkeypatch.setattr(module, "turns", lambda names, rounds: [list(names), list(names)])
