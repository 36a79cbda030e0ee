"""`tokenprune report` on a model of each kind, and what the other commands say of those that they do not take."""

import json

import pytest
import torch
from tiny_hub import save_clip, save_lvlm, save_pipeline

import tokenprune
from tokenprune import cli
from tokenprune.errors import UnsupportedModel
from tokenprune.evals import digits_checkpoints, digits_pipelines, model_kinds, models
from tokenprune.evals.digits_denoisers import CHECKPOINTS
from tokenprune.evals.digits_lvlm import LVLM, lvlm_digits
from tokenprune.evals.lvlm_eval import draw_questions, example_batch
from tokenprune.evals.model_kinds import KINDS, PREFIXES

COMMANDS = sorted(model_kinds.ALL)
NEEDED = {
    "compare": ["--output", "out"],
    "patterns": ["--output", "out"],
    "search": ["--method", "top_k", "--flops", "0.6", "--output", "out"],
    "calibrate": ["--flops", "0.6", "--output", "out.json"],
    "train": ["--method", "ltmp", "--flops", "0.6", "--output", "out"],
    "score": ["--pictures", ".", "--real", "."],
}


@pytest.fixture(autouse=True)
def _threads(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(before)


def report(capsys, *arguments):
    assert cli.main(["report", *map(str, arguments), "--threads", "1", "--quiet", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def named(command, name):
    model = {"score": ["--features", name], "train": [name]}.get(command, ["--model", name])
    return [command, *model, *NEEDED.get(command, [])]


def test_every_command_that_names_a_model_is_known():
    [commands] = [action for action in cli.parser()._actions if hasattr(action, "choices") and action.choices]
    naming = {
        name
        for name, command in commands.choices.items()
        if any(action.dest in ("model", "features") for action in command._actions)
    }
    assert naming == model_kinds.ALL


def test_every_name_of_the_package_is_loaded_or_of_a_kind():
    assert {*CHECKPOINTS, LVLM, models.DEBLUR} <= set(KINDS)
    loaded = {*models.SHIPPED, models.MASKS, models.DEBLUR}
    assert {*cli.RECIPES} <= loaded | set(KINDS)
    for name in {*KINDS, *(f"{prefix}x" for prefix in PREFIXES)} - loaded:
        with pytest.raises(UnsupportedModel, match=f"load_model is not for {name}, which "):
            models.load_model(name)


@pytest.mark.parametrize("name", [*KINDS, *(f"{prefix}owner/name" for prefix in PREFIXES)])
def test_a_command_that_is_not_for_a_model_says_which_is(name, capsys, tmp_path):
    kind = model_kinds.kind_of(name)
    for command in COMMANDS:
        if command in kind.commands:
            continue
        assert cli.main(named(command, name)) == 1
        error = capsys.readouterr().err
        assert f"is not for {name}, which {kind.does}" in error
        assert all(taken in error for taken in kind.commands)
        assert kind.instead.format(name=name) in error
    assert not list(tmp_path.iterdir())


def test_patterns_refuse_a_second_model_of_another_kind(capsys):
    command = ["patterns", "--model", "digits-vit", "--other", "dit-digits", "--output", "out"]
    assert cli.main(command) == 1
    assert "patterns is not for dit-digits" in capsys.readouterr().err


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_of_a_diffusion_model_it_is_of_a_whole_run(name, checkpoints, capsys):
    options = ["--model", name, "--checkpoint", checkpoints, "--method", "at_edm", "--flops", 0.8]
    told = report(capsys, *options, "--steps", 3)
    pipe = digits_pipelines.digits_pipeline(name, [checkpoints])
    tokenprune.patch(pipe, "at_edm", flops=0.8)
    pipe(torch.tensor([0]), num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    assert told == json.loads(json.dumps(tokenprune.report(pipe).to_dict()))
    assert told["flops_ratio"] == pytest.approx(0.8, abs=0.1)
    alone = report(capsys, *options, "--steps", 3, "--guidance", 1)
    assert told["flops_before"] == pytest.approx(alone["flops_before"], rel=0.01), "a mean over forwards, of one image"


def test_a_denoiser_without_weights_says_how_to_come_by_them(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_checkpoints, "SHIPPED", tmp_path)
    assert cli.main(["report", "--model", "dit-digits"]) == 1
    assert "tokenprune train dit-digits --output FOLDER" in capsys.readouterr().err


def test_of_the_vision_language_model_it_is_of_a_prompt(capsys):
    told = report(capsys, "--model", LVLM, "--method", "fastv")
    model = tokenprune.patch(lvlm_digits(), "fastv", keep=0.25)
    with torch.inference_mode():
        model(**example_batch(draw_questions(1), 1))
    assert told == json.loads(json.dumps(tokenprune.report(model).to_dict()))
    assert told["places"][-1]["tokens_out"] == 16, "keep=0.25 where no budget is named"


def test_of_the_other_models_of_the_package(capsys):
    for name, method in (("deblur-swin", "sparsevit"), ("digit-masks", "tome"), ("digits-swin", "sparsevit")):
        told = report(capsys, "--model", name, "--method", method, "--flops", 0.8)
        assert told["method"] == method
        assert told["flops_ratio"] == pytest.approx(0.8, abs=0.05)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for name in ("clip", "vlm", "pipe"):
        (folder / name).mkdir()
    save_clip(folder / "clip")
    save_lvlm(folder / "vlm")
    save_pipeline(folder / "pipe", folder / "clip")
    return folder


@pytest.mark.parametrize(
    ("kind", "options", "ratio"),
    [("clip", ["--flops", 0.8], 0.8), ("vlm", ["--tokens", 8], None), ("pipe", ["--flops", 0.8, "--steps", 2], 0.8)],
)
def test_of_models_of_transformers_and_diffusers(kind, options, ratio, hub, capsys, monkeypatch):
    if kind == "vlm":  # the small LLaVA knows one size and one kind of question
        monkeypatch.setattr("tokenprune.evals.report_command.PICTURE_PIXELS", 64)
        monkeypatch.setattr("tokenprune.evals.report_command.QUESTION", "what is ?")
    method = {"clip": "top_k", "vlm": "fastv", "pipe": "tomesd"}[kind]
    told = report(capsys, "--model", f"{kind}:{hub / kind}", "--method", method, *options)
    assert told["method"] == method
    if ratio is not None:
        assert told["flops_ratio"] == pytest.approx(ratio, abs=0.1)
    else:
        assert told["places"][-1]["tokens_out"] == 8
    assert cli.main(["methods", "--model", f"{kind}:{hub / kind}", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert method in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "clip:x", "--random-weights"], "comes with its own weights"),
        (["--model", "vlm:x", "--steps", "3"], "--steps: only for dit-digits, unet-digits"),
        (["--model", "digits-vit", "--guidance", "2"], "--guidance: only for"),
        (["--model", LVLM, "--dtype", "bfloat16"], "float32 on the CPU"),
        (["--model", LVLM, "--keep", "0.5", "--flops", "0.6"], "of one budget"),
    ],
)
def test_what_does_not_belong_is_refused(arguments, message, capsys):
    assert cli.main(["report", *arguments]) == 1
    assert message in capsys.readouterr().err
