"""Every evaluation that is shared out, small: what one process finds is what each of several finds.

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
from tokenprune.evals import digits_denoisers, digits_lvlm, evaluate, generation
from tokenprune.evals.data import ImageData, open_data
from tokenprune.evals.digits_pipelines import pipeline_of
from tokenprune.evals.lvlm_eval import evaluate_lvlm

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
        "neighbours": evaluate(_vit(0), (images, labels), *top_k, **settings),
        "saliency": evaluate(_vit(0), crops, *top_k, **settings, saliency=_map),
        "pictures": generation.evaluate_generation(
            pipeline_of(_dit()), ["at_edm"], [{"flops": 0.8}], samples=7, batch_size=2, steps=2
        ),
        "answers": evaluate_lvlm(digits_lvlm.lvlm_digits(), ["top_k"], samples=7, batch_size=2, baselines=False),
    }
    told: dict[str, Any] = {what: table.rows for what, table in tables.items()}
    torch.manual_seed(3)
    many = torch.randn(40, 3, 64, 64)
    schedule = tokenprune.search(_vit(3), many, "top_k", flops=0.7, candidates=4, output=folder / "search")
    command = ["eval", "--model", "digits-vit", "--samples", "40", "--batch-size", "16", "--method", "top_k", "--json"]
    assert cli.main([*command, "--threads", "1", "--output", str(folder / TABLE)]) == 0
    return {**told, "schedule": [dict(schedule.schedule), dict(schedule.found)]}


def _vit(classes: int) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64, num_classes=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


def _dit() -> nn.Module:
    torch.manual_seed(0)
    model = digits_denoisers.dit(num_layers=3, num_attention_heads=1)
    for parameter in model.parameters():  # its last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def _map(model: Any, images: Tensor) -> Tensor:
    [features] = model.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
    return features.norm(dim=1, keepdim=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    generation.REAL_IMAGES = 40
    into = Path(sys.argv[1])
    result = found(into)
    (into / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
