"""Thresholds from unlabelled images: the mean meets the budget, each image keeps what it needs, and no other's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build, images
from torch import Tensor, nn
from torch.nn import functional as F

import tokenprune
from tokenprune import cli
from tokenprune.stored_schedule import StoredSchedule, load_schedule

FLOPS = 0.7


@pytest.fixture(scope="module")
def found() -> StoredSchedule:
    model = build("class_token")
    return tokenprune.calibrate(model, images(model, 24), flops=FLOPS, batch_size=10)


def calibrated(found: StoredSchedule) -> nn.Module:
    return tokenprune.patch(build("class_token"), schedule=found)


def report_of(model: nn.Module, x: Tensor) -> dict:
    with torch.no_grad():
        model(x)
    return tokenprune.report(model).to_dict()


def test_the_mean_meets_the_budget_and_images_differ(found: StoredSchedule) -> None:
    model = calibrated(found)
    x = images(model, 24)
    told = report_of(model, x)
    assert told["flops_ratio"] == pytest.approx(FLOPS, abs=0.004)
    assert told["flops_ratio"] == pytest.approx(found.found["flops_ratio"], abs=1e-6)
    assert all(place["fewest"] < place["most"] for place in told["places"][1:])
    alone = [report_of(model, x[i : i + 1])["flops_ratio"] for i in range(24)]
    assert sum(alone) / 24 == pytest.approx(told["flops_ratio"])
    assert max(alone) > min(alone)


def test_an_image_is_the_same_whatever_its_batch_mates_are(found: StoredSchedule) -> None:
    model = calibrated(found)
    x = images(model, 6)
    with torch.no_grad():
        together = model(x)
        for i in range(6):
            torch.testing.assert_close(model(x[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_the_model_is_left_alone_and_the_file_gives_the_same(found: StoredSchedule, tmp_path: Path) -> None:
    model = build("class_token")
    x = images(model, 4)
    with torch.no_grad():
        plain = model(x)
        tokenprune.calibrate(model, x, flops=0.8)
        assert torch.equal(model(x), plain)
        found.save(tmp_path / "calibrated.json")
        assert torch.equal(tokenprune.patch(model, schedule=tmp_path / "calibrated.json")(x), calibrated(found)(x))


def test_dropout_is_off_and_on_again(found: StoredSchedule) -> None:
    model = build("class_token").train()
    model.blocks[0].eval()
    for block in model.blocks:
        block.mlp.drop1.p = 0.5
    modes = [module.training for module in model.modules()]
    assert tokenprune.calibrate(model, images(model, 24), flops=FLOPS, batch_size=10).options == found.options
    assert [module.training for module in model.modules()] == modes


def test_no_images_or_batches_of_none_are_refused() -> None:
    model = build("class_token")
    with pytest.raises(tokenprune.BudgetError, match="images must be a whole number of at least 1"):
        tokenprune.calibrate(model, images(model, 2)[:0], flops=FLOPS)
    with pytest.raises(tokenprune.BudgetError, match="batch_size must be"):
        tokenprune.calibrate(model, images(model, 2), flops=FLOPS, batch_size=0)


def test_pairs_from_the_threshold_of_a_block_on_are_merged_as_a_loop_says() -> None:
    model = build("class_token")
    x = images(model, 1)
    caught: list[Tensor] = []
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, output: caught.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    keys = F.normalize(caught[0].reshape(36, 3, model.blocks[1].attn.num_heads, -1)[1:, 1].mean(1), dim=-1).tolist()
    best = {}
    for a in range(1, 35, 2):  # behind one class token the sequence's even places are those of side A
        best[a] = max(sum(p * q for p, q in zip(keys[a], keys[b], strict=True)) for b in range(0, 35, 2))
    ordered = sorted(best.values())
    threshold = (ordered[5] + ordered[6]) / 2
    tokenprune.patch(model, "adaptive_tome", schedule={1: 1.0}, threshold=threshold)
    with torch.no_grad(), tokenprune.record(model) as recording:
        model(x)
    gone = [a for a, cosine in best.items() if cosine >= threshold]
    assert len(gone) == 11
    left = recording.forwards[0].places[0].kept[0].tolist()
    assert left == [token for token in range(35) if token not in gone]


@pytest.mark.parametrize("method", ["saint", "algm"])
def test_other_methods_with_a_threshold(method: str) -> None:
    model = build("class_token")
    x = images(model, 16)
    found = tokenprune.calibrate(model, x, method, flops=0.85, batch_size=16)
    assert (found.method, found.found["flops_ratio"]) == (method, pytest.approx(0.85, abs=0.01))
    assert report_of(tokenprune.patch(model, schedule=found), x)["flops_ratio"] == found.found["flops_ratio"]


def test_what_cannot_be_calibrated() -> None:
    model = build("class_token")
    x = images(model, 2)
    with pytest.raises(tokenprune.UnsupportedMethod, match="'top_k'"):
        tokenprune.calibrate(model, x, "top_k", flops=0.6)
    with pytest.raises(tokenprune.BudgetError):
        tokenprune.calibrate(model, x, flops=0.001)
    with pytest.raises(tokenprune.BudgetError, match="calibrate"):
        tokenprune.patch(model, "adaptive_tome", flops=0.6)
    with pytest.raises(tokenprune.UnsupportedMethod, match="threshold is"):
        tokenprune.patch(model, "adaptive_tome", keep=0.5, threshold=2.0)


@pytest.mark.parametrize("method", ["saint", "algm"])
@pytest.mark.parametrize(
    ("flops", "changed"),
    [(0.8, {"rate": 0.9}), (0.9, {"places": (1, 2)}), (0.9, {"restore": "feature"}), (0.9, {"restore": "fusion"})],
)
def test_what_is_found_under_options_is_what_patch_takes(
    method: str, flops: float, changed: dict[str, object], tmp_path: Path
) -> None:
    model = build("class_token")
    x = images(model, 8)
    found = tokenprune.calibrate(model, x, method, flops=flops, **changed)
    found.save(tmp_path / "found.json")
    told = report_of(tokenprune.patch(model, schedule=tmp_path / "found.json"), x)
    assert told["flops_ratio"] == found.found["flops_ratio"]
    assert told["restore"] == changed.get("restore", told["restore"])


def test_images_and_options_that_are_none_are_refused() -> None:
    model = build("class_token")
    x = images(model, 2)
    for wrong in ([x[0]], None, x[0], x.numpy()):
        with pytest.raises(tokenprune.TokenPruneError, match="images must be one tensor"):
            tokenprune.calibrate(model, wrong, flops=0.7)
    for options in ({"keep": 0.5}, {"prefix_only_last": False}, {"weights": "x"}):
        with pytest.raises(tokenprune.UnsupportedMethod, match="has no option"):
            tokenprune.calibrate(model, x, flops=0.7, **options)


def test_the_command_writes_what_patch_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    arguments = ["calibrate", "--model", "digits-vit", "--flops", "0.7", "--restore", "feature", "--output", str(file)]
    arguments += ["--samples", "6", "--quiet"]
    assert cli.main(arguments) == 0
    assert "threshold=" in capsys.readouterr().out
    found = load_schedule(file)
    assert (found.method, found.restore, found.found["images"]) == ("adaptive_tome", "feature", 6)
    assert found.found["flops_ratio"] == pytest.approx(0.7, abs=0.01)
    for wrong in (["--model", "dit-digits"], ["--method", "top_k"], ["--flops", "2"], ["--output", "found.txt"]):
        assert cli.main([*arguments, *wrong]) == 1
        assert "tokenprune: error" in capsys.readouterr().err
