import json

import pytest
import torch

from tokenprune import cli
from tokenprune.evals import generation, train_diffusion


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(generation, "REAL_IMAGES", 100)
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("model", ["dit-digits", pytest.param("unet-digits", marks=pytest.mark.full)])
def test_eval_prints_quality_and_cost(model, capsys, tmp_path):
    quick = ["--quiet", "--threads", 1, "--samples", 4, "--steps", 2, "--flops", 0.8, "--method", "at_edm"]
    assert run("eval", "--model", model, *quick, "--json", "--output", tmp_path / "t.md") == 0
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
        (["bench", "--model", "unet-digits", "--random-weights"], "takes no --random-weights"),
        (["bench", "--model", "unet-digits", "--batch-size", "4"], "one batch size"),
        (["viz", "--model", "dit-digits"], "demo-diffusion"),
        (["eval", "--model", "digits-vit", "--steps", "5"], "only for dit-digits, unet-digits"),
        (["eval", "--model", "digits-vit", "--rounds", "20"], "only for dit-digits, unet-digits"),
        (["eval", "--model", "dit-digits", "--samples", "1", "--steps", "1"], "at least two"),
        (["train", "dit-digits", "--output", "x", "--steps", "3"], "by its recipe"),
    ],
)
def test_what_does_not_belong_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err


def test_train_goes_to_the_recipe(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(train_diffusion, "main", asked.append)
    assert run("train", "unet-digits", "--output", tmp_path) == 0
    assert asked == [["unet-digits", "--output", str(tmp_path), "--threads", "1"]]


def test_methods_are_those_of_the_pipeline(capsys):
    assert run("methods", "--model", "dit-digits", "--json") == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {"random", "uniform"} <= names
    assert "ats" not in names
