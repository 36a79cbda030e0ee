from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from families import build, images
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from windows_zoo import build as build_windows
from windows_zoo import images as window_images

import tokenprune
from tokenprune import cli
from tokenprune.evals import commands
from tokenprune.evals.latency_profile import profile_latency
from tokenprune.evals.table import Table
from tokenprune.latency import load_table, table_path

SPENT = 0.0


def spend(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Hook: half a second for each token that enters a block or leaves it, and 5 for each image that lost some."""
    global SPENT
    entering, leaving = args[0].shape[1], output.shape[1]
    SPENT += args[0].shape[0] * ((entering + leaving) / 2 + 5 * (entering != leaving))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_known_cost_comes_out(batch: int) -> None:
    """What 35 tokens and 4 blocks take is known, and so is the time of a schedule that was not measured."""
    model = build("class_token")
    for block in model.blocks:
        block.register_forward_hook(spend)
    x = images(model, 2)
    table = profile_latency(model, x, ["top_k"], {"keep": 0.5}, batch_sizes=[batch], rounds=2, clock=lambda: SPENT)
    [row] = table.rows
    assert (row.batch, row.tokens) == (batch, 35)
    counts = range(35, 1, -4)
    whole = 4 * 36
    expected = [1.0, *((whole - 3.5 * (35 - count) + 5) / whole for count in counts[1:])]
    assert row.latency == pytest.approx(expected)
    tokenprune.patch(model, "top_k", schedule={1: 0.6})
    share = row.predicted("top_k", tokenprune.report(model).to_dict()["flops_ratio"], 1)
    assert share == pytest.approx((whole - 2.5 * 14 + 5) / whole, rel=0.05)
    assert table.environment["trusted"]
    with pytest.raises(tokenprune.TokenPruneError, match="no method can be profiled"):
        profile_latency(model, x, ["top_k"], {"flops": 0.001}, batch_sizes=[1])


def attended(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Hook: a second for each token that an attention is given."""
    global SPENT
    SPENT += args[0].shape[0] * args[0].shape[1]


@pytest.mark.parametrize("method", ["sparsevit", "top_k"])
def test_windows_are_profiled_and_predicted_too(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path))
    model = build_windows()
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.register_forward_hook(attended)
    table = profile_latency(
        model, window_images(), [method], {"keep": 0.5}, batch_sizes=[2], rounds=2, clock=lambda: SPENT
    )
    [row] = table.rows
    assert (row.batch, row.tokens) == (2, 18 * 12)
    table.save(table_path(model))
    if method == "top_k":  # attends whole
        with pytest.raises(tokenprune.SlowdownError, match="not faster"):
            tokenprune.patch(model, method, keep=0.5, require_speedup=True)
        return
    tokenprune.patch(model, method, keep=0.5, require_speedup=True)
    # 36 windows in two blocks and 9 in four, of which 18 and 5 are attended.
    expected = (2 * 36 + 4 * 9) / (2 * 18 + 4 * 5)
    assert f"predicted speed-up {expected:.2f} at batch 2, 216 tokens" in tokenprune.report(model).to_dict()["speed"]


def test_the_command_stores_what_patch_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiled_vit.py").write_text(
        "import timm\n"
        "def build():\n"
        "    return timm.create_model('vit_tiny_patch16_224', img_size=64, depth=3, num_classes=3)\n"
    )
    monkeypatch.setattr(commands, "bench", lambda *_, **__: Table([{"method": "top_k", "flops_ratio": 0.5}]))
    monkeypatch.setattr(
        commands, "profile_latency", partial(profile_latency, clock=partial(next, itertools.count(1.0)))
    )
    arguments = ["bench", "--model", "profiled_vit:build", "--method", "top_k", "--keep", "0.5", "--batch-size", "2"]
    assert cli.main([*arguments, "--quiet", "--threads", str(torch.get_num_threads()), "--save-profile"]) == 0
    import profiled_vit

    model = profiled_vit.build().eval()
    table = load_table(model)
    assert table is not None
    assert [*table.rows[0].overhead] == ["top_k"]
    with pytest.warns(UserWarning, match="not faster"):
        tokenprune.patch(model, "top_k", keep=0.5)
    assert "at batch 2, 16 tokens" in str(tokenprune.report(model))
