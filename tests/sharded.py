"""Every evaluation of image towers that is shared out, small: what one process finds is what each of several finds.

As a script it is one of several processes and writes what it found to the folder that it is given.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune import cli
from tokenprune.evals import evaluate
from tokenprune.evals.data import ImageData, open_data
from tokenprune.evals.digit_masks import DigitMasks, masked_digits
from tokenprune.evals.streams import Stream

TABLE = "table.json"


def found(folder: Path) -> dict[str, Any]:
    """{what: what was found}, each a list of rows or a schedule; files go to `folder`."""
    images = torch.randn(23, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels, settings = torch.arange(23) % 3, {"batch_size": 5, "baselines": False}
    crops = ImageData("crops", open_data(images).items, 23, None, groups=torch.arange(23) // 4)
    top_k = ["top_k"], [{"keep": 0.4}]
    tables = {
        "classes": evaluate(_vit(3), (images, labels), ["top_k", "ats"], [{"keep": 0.4}, {}], batch_size=5),
        "a subset": evaluate(_vit(3), (images, labels), *top_k, **settings, samples=7, seed=2),
        "one batch": evaluate(_vit(3), (images[:4], labels[:4]), *top_k, **settings),
        "a stream": evaluate(_vit(3), _stream(images), *top_k, **settings, samples=13),
        "masks": evaluate(DigitMasks().eval(), masked_digits("test", 7), *top_k, batch_size=2, baselines=False),
        "neighbours": evaluate(_vit(0), (images, labels), *top_k, **settings),
        "saliency": evaluate(_vit(0), crops, *top_k, **settings, saliency=_map),
    }
    told: dict[str, Any] = {what: table.rows for what, table in tables.items()}
    torch.manual_seed(3)
    many = torch.randn(40, 3, 64, 64)
    schedule = tokenprune.search(_vit(3), many, "top_k", flops=0.7, candidates=4, output=folder / "search")
    command = ["eval", "--model", "digits-vit", "--samples", "40", "--batch-size", "16", "--method", "top_k", "--json"]
    assert cli.main([*command, "--threads", "1", "--output", str(folder / TABLE)]) == 0
    return {**told, "schedule": [dict(schedule.schedule), dict(schedule.found)]}


def _stream(images: Tensor) -> ImageData:
    return ImageData("stream", Stream("stream", lambda: enumerate(images), lambda row: (row[1], row[0] % 3)), 23, 3)


def _vit(classes: int) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64, num_classes=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


def _map(model: Any, images: Tensor) -> Tensor:
    [features] = model.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
    return features.norm(dim=1, keepdim=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    into = Path(sys.argv[1])
    result = found(into)
    (into / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
