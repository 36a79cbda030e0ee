"""How much of what `sparsevit` saves in multiply-adds a Swin-T saves in time, with random weights at a real size."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, Table, environment
from tokenprune.evals.throughput import measure_together

BUDGETS: Mapping[str, dict[str, Any]] = {
    "published ratios": {},
    "60% of the windows left out": {"ratios": (0.6, 0.6, 0.6, 0.6)},
}


def compare(
    model: nn.Module, images: Tensor, *, budgets: Mapping[str, dict[str, Any]] = BUDGETS, rounds: int = 26
) -> Table:
    """Time of a forward of `model` under each budget of `sparsevit` on images [B, C, H, W].

    Columns: `flops` (share of the multiply-adds), `speedup` (median of per-round ratios, with a 95% bootstrap
    interval), `of_promise` (that times `flops`: 1 where time falls as multiply-adds do), `control` (the unpatched model
    against itself).
    """
    patched = [tokenprune.patch(shared_copy(model), "sparsevit", **budget) for budget in budgets.values()]
    arms = [partial(_run, arm, images) for arm in (model, *patched, shared_copy(model))]
    found = measure_together(arms, rounds)[1:-1]
    rows: list[Row] = []
    for name, one, arm in zip(budgets, found, patched, strict=True):
        flops = tokenprune.report(arm).to_dict()["flops_ratio"]
        rows.append({"windows": name, "flops": flops, **one.cells(), "of_promise": one.speedup.estimate * flops})
    return Table(rows, environment(images.device, images.dtype))


def _run(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


if __name__ == "__main__":
    torch.set_num_threads(2)
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 672
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=size).eval()
    print(compare(swin, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))).to_markdown())
