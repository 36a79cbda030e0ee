import json

import pytest
import torch

from tokenprune import cli
from tokenprune.evals import digits_checkpoints, generation, generation_bench, train_diffusion
from tokenprune.evals.stats import Interval
from tokenprune.evals.throughput import Timing


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(generation, "REAL_IMAGES", 100)
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("model", ["dit-digits", pytest.param("unet-digits", marks=pytest.mark.full)])
def test_eval_prints_quality_and_cost(model, checkpoints, capsys, tmp_path):
    quick = ["--quiet", "--threads", 1, "--samples", 4, "--steps", 2, "--flops", 0.8, "--method", "at_edm"]
    shown = ["--json", "--output", tmp_path / "t.md"]
    assert run("eval", "--model", model, "--checkpoint", checkpoints, *quick, *shown) == 0
    table = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in table["rows"]}
    assert {"unpatched", "at_edm", "fewer steps", "random", "uniform"} == set(rows)
    assert rows["unpatched"]["gmacs"] > 0
    assert {"frechet", "accuracy", "flops_ratio"} <= set(rows["unpatched"])
    assert {"frechet_rise", "accuracy_drop", "psnr", "cosine"} <= set(rows["fewer steps"])
    assert table["environment"]["model"] == model
    assert table["environment"]["steps"] == 2
    assert (tmp_path / "t.md").read_text().startswith("| method |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--model", "dit-digits", "--data", "folder"], "takes no --data"),
        (["eval", "--model", "unet-digits", "--random-weights"], "for bench"),
        (["bench", "--model", "unet-digits", "--random-weights", "--checkpoint", "folder"], "not both"),
        (["bench", "--model", "unet-digits", "--profile"], "are for models that take images"),
        (["bench", "--model", "unet-digits", "--batch-size", "4"], "one batch size"),
        (["viz", "--model", "dit-digits"], "demo-diffusion"),
        (["eval", "--model", "digits-vit", "--steps", "5"], "only for dit-digits, unet-digits"),
        (["eval", "--model", "digits-vit", "--rounds", "20"], "only for dit-digits, unet-digits"),
        (["eval", "--model", "dit-digits"], "tokenprune train dit-digits --output FOLDER"),
        (["bench", "--model", "unet-digits", "--checkpoint", "folder"], "tokenprune train unet-digits --output FOLDER"),
        (["demo-diffusion"], "tokenprune train dit-digits --output FOLDER"),
        (["train", "dit-digits", "--output", "x", "--steps", "3"], "by its recipe"),
    ],
)
def test_what_does_not_belong_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits_checkpoints, "SHIPPED", tmp_path)
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_one_picture_is_too_few(checkpoints, capsys):
    few = ["--samples", 1, "--steps", 1, "--method", "random", "--quiet", "--threads", 1]
    assert run("eval", "--model", "dit-digits", "--checkpoint", checkpoints, *few) == 1
    assert "at least two" in capsys.readouterr().err


def test_bench_needs_no_weights(small_denoisers, capsys, monkeypatch):
    timed = Timing(20, 1, 1.0, 0.5, Interval(2.0, 1.9, 2.1), 1.0, True, 1, None, None)
    monkeypatch.setattr(generation_bench, "measure", lambda *_, **__: timed)
    quick = ["--steps", 2, "--flops", 0.8, "--method", "random", "--quiet", "--threads", 1, "--json"]
    assert run("bench", "--model", "dit-digits", "--random-weights", *quick) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["random"]["speedup"] == 2.0


def test_train_goes_to_the_recipe(monkeypatch, tmp_path):
    asked = []

    def train(*given):
        asked.append((*given, torch.get_num_threads()))
        return {"training_cpu_seconds": 1}

    monkeypatch.setattr(train_diffusion, "train", train)
    assert run("train", "unet-digits", "--output", tmp_path) == 0
    assert asked == [("unet-digits", tmp_path, 1)]


def test_methods_are_those_of_the_pipeline(capsys):
    assert run("methods", "--model", "dit-digits", "--json") == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {"random", "uniform"} <= names
    assert "ats" not in names
