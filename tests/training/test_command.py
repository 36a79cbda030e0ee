"""`tokenprune train MODEL --method ltmp`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import tokenprune
from tokenprune import cli
from tokenprune.evals.models import load_model


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for label in range(2):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (90, 80), (40 * i, 99 * label, 9)).save(tmp_path / "pictures" / str(label) / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def two_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "two_classes.py").write_text(
        "import timm\ndef build():\n    return timm.create_model('test_vit', num_classes=2, img_size=64)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "two_classes:build"


@pytest.mark.filterwarnings("ignore:what was learned costs")
@pytest.mark.usefixtures("short")
def test_a_folder_of_pictures(pictures: Path, two_classes: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With timm's training transform; what is written is what `patch` takes."""
    arguments = ["train", two_classes, "--method", "ltmp", "--data", str(pictures), "--flops", "0.8", "--quiet"]
    assert cli.main([*arguments, "--batch-size", "2", "--output", str(tmp_path / "learned")]) == 0
    assert "3 steps: loss" in capsys.readouterr().out
    torch.manual_seed(0)
    model = load_model(two_classes).model
    tokenprune.patch(model, weights=tmp_path / "learned")
    assert tokenprune.report(model).to_dict()["method"] == "ltmp"


def test_what_is_refused(pictures: Path, two_classes: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    common = ["--output", str(tmp_path / "out")]
    for arguments, told in (
        (["train", "digits-vit", "--flops", "0.6"], "--method ltmp"),
        (["train", "digits-vit", "--method", "ltmp"], "--flops"),
        (["train", "digits-vit", "--method", "tnt", "--flops", "0.6", "--option", "noise"], "such as noise=0.3"),
        (["train", "digits-vit", "--method", "tnt", "--flops", "0.6", "--option", "seed=3"], "such as noise=0.3"),
        (["train", "digits-vit", "--method", "tnt", "--flops", "0.6", "--option", "transform=3"], "such as noise=0.3"),
        (["train", "digits-vit", "--method", "tnt", "--flops", "0.6", "--option", "noise=-1"], "positive number"),
        (["train", two_classes, "--method", "ltmp", "--flops", "0.6"], "no images of its own"),
        (["train", two_classes, "--method", "top_k", "--flops", "0.6", "--data", str(pictures)], "learns nothing"),
        (["train", two_classes, "--method", "ltmp", "--flops", "7", "--data", str(pictures)], "share in (0, 1]"),
        (
            ["train", two_classes, "--method", "ltmp", "--flops", "0.6", "--data", str(tmp_path / "empty")],
            "no pictures",
        ),
        (["train", "digits-vit", "--method", "ltmp", "--flops", "0.6", "--steps", "3"], "--epochs"),
    ):
        assert cli.main([*arguments, *common]) == 1
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
