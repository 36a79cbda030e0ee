import argparse
import csv
import io
import json
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
from PIL import Image

import tokenprune
from tokenprune import cli
from tokenprune.evals import bench, doctor
from tokenprune.evals.models import load_model
from tokenprune.evals.table import Table
from tokenprune.evals.throughput import measure
from tokenprune.stored_schedule import StoredSchedule

QUICK = ["--quiet", "--threads", "1"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch, threads):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_vit.py").write_text(
        "import timm\n"
        "def build():\n"
        "    return timm.create_model('vit_tiny_patch16_224', img_size=64, depth=3, num_classes=3)\n"
    )
    yield
    sys.modules.pop("small_vit", None)


@pytest.fixture
def pictures(tmp_path):
    for index, name in enumerate(["a", "b", "c"]):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (70, 80), (80 * index, 40 * number, 9)).save(
                tmp_path / "pictures" / name / f"{number}.png"
            )
    return tmp_path / "pictures"


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in cli.EXAMPLES)])
def test_help_and_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == (0 if arguments else 2)
    if len(arguments) == 2:
        shown = capsys.readouterr().out
        assert all(example in shown for example in cli.EXAMPLES[arguments[0]])


@pytest.mark.parametrize("name", cli.EXAMPLES)
def test_every_example_is_a_valid_command(name):
    for example in cli.EXAMPLES[name]:
        program, *arguments = example.split()
        assert program == "tokenprune"
        assert cli.parser().parse_args(arguments).command == name


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench"],
        ["bench", "--model", "x", "--flops", "much"],
        ["bench", "--model", "x", "--batch-size", "0"],
        ["bench", "--model", "x", "--json", "--csv"],
        ["eval", "--model", "x", "--dtype", "int8"],
        ["score", "--pictures", "x", "--reference", "x", "--seed", "-1"],
        ["nonsense"],
        ["train", "another-model", "--output", "x"],
    ],
)
def test_wrong_usage_is_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert "usage: tokenprune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--model", "no_such_model"], "no_such_model"),
        (["bench", "--model", "small_vit:build", "--method", "no_such_method"], "no_such_method"),
        (["bench", "--model", "small_vit:build", "--method", "top_k", "--rounds", "3"], "at least 20"),
        (["bench", "--model", "small_vit:build", "--keep", "1.7", "--method", "top_k"], "keep=0.6"),
        (["bench", "--model", "small_vit:build", "--flops", "2"], "flops=0.6"),
        (["bench", "--model", "small_vit:build", "--flops", "0", "--output", "table.md"], "flops=0.6"),
        (["bench", "--model", "small_vit:build", "--output", "table.xlsx"], ".json"),
        (["bench", "--model", "small_vit:build", "--output", "absent/table.md"], "absent"),
        (["methods", "--output", "table.xlsx"], ".json"),
        (["eval", "--model", "digits-vit", "--output", "table"], ".json"),
        (["viz", "--model", "digits-vit", "--output", "kept.xyz"], ".png"),
        (["bench", "--model", "small_vit:build", "--device", "cuda:77"], "cuda:77"),
        (["eval", "--model", "small_vit:build"], "--data"),
        (["eval", "--model", "small_vit:build", "--data", "openclipart:nowhere"], "nowhere"),
        (["viz", "--model", "small_vit:build"], "--image"),
        (["viz", "--model", "small_vit:build", "--image", "absent.png"], "absent.png"),
        (["viz", "--model", "small_vit:build", "--image", "w.png", "--flops", "0.0001"], "flops"),
        (["bench", "--model", "test_vit", "--checkpoint", "w.pth"], "pickle"),
    ],
)
def test_failures_are_one_line_and_exit_one(arguments, message, capsys, tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({}))
    Image.new("RGB", (64, 64)).save(tmp_path / "w.png")
    assert run(*arguments) == 1
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("tokenprune: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_device_of_score_that_is_not_there_is_told(capsys, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    both = ["--pictures", str(tmp_path), "--real", str(tmp_path)]
    assert run("score", *both, "--features", "small_vit:build", "--device", "cuda:77") == 1
    assert "tokenprune: error: --device cuda:77" in capsys.readouterr().err


def test_methods_lists_what_there_is(capsys):
    import tokenprune

    assert run("methods", "--json") == 0
    rows = Table.from_json(capsys.readouterr().out).rows
    assert [row["name"] for row in rows] == [method.name for method in tokenprune.methods()]
    assert next(row["options"] for row in rows if row["name"] == "tome") == "r=8, proportional=True, places=None"
    assert run("methods", "--model", "small_vit:build", "--markdown") == 0
    assert "| tome |" in capsys.readouterr().out


NO_DEVICE = {"methods", "train"}  # nothing is computed; accelerate has its own
NO_TABLE = {"viz"}  # a picture


@pytest.mark.parametrize("name", cli.EXAMPLES)
def test_options_are_alike(name):
    [commands] = [action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    options = {option for action in commands.choices[name]._actions for option in action.option_strings}
    expected = {"--json"} if name not in NO_TABLE else set()
    if name not in NO_DEVICE:
        expected |= {"--device", "--seed"} if name == "score" else {"--device", "--dtype", "--seed", "--threads"}
    assert expected <= options


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["search", "--method", "top_k", "--flops", "0.8", "--candidates", "3", "--samples", "4"], "schedule"),
        (["calibrate", "--method", "tome", "--flops", "0.8", "--samples", "4"], "found"),
        (["patterns", "--method", "top_k", "--keep", "0.5", "--samples", "4", "--resamples", "5"], "methods"),
    ],
)
def test_json_is_all_that_is_printed(command, key, capsys, tmp_path):
    output = tmp_path / ("out.json" if command[0] == "calibrate" else "out")
    name, *more = command
    assert run(name, "--model", "digits-vit", *more, "--output", output, "--json", *QUICK) == 0
    assert key in json.loads(capsys.readouterr().out)


def test_a_recipe_prints_its_record_as_json(monkeypatch, tmp_path, capsys):
    from tokenprune.evals import train_digits

    monkeypatch.setattr(train_digits, "train", lambda *given: print("step 1") or {"test_accuracy": 0.5})
    assert run("train", "digits-vit", "--output", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"test_accuracy": 0.5}


def test_what_a_recipe_does_not_take_is_not_ignored(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run("train", "digits-vit", "--output", tmp_path, "--epochs", "3", "--learning-rate", "2")
    assert stopped.value.code == 2
    assert "takes no --epochs, --learning-rate" in capsys.readouterr().err


def test_exit_codes_are_told(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "Exit codes: 0" in capsys.readouterr().out


def test_bench_prints_and_writes(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.__globals__, "measure", partial(measure, sample_seconds=0))
    command = ["bench", "--model", "small_vit:build", "--method", "top_k", "--keep", "0.5", "--flops", "0.7"]
    assert run(*command, "--batch-size", "1", "--csv", "--output", tmp_path / "t.json", *QUICK) == 0
    printed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    written = json.loads((tmp_path / "t.json").read_text())
    budgets = ["flops=0.7"] * 4 + ["keep=0.5"] * 4
    assert [row["budget"] for row in printed] == ["", *budgets]
    assert [row["budget"] for row in written["rows"]] == ["", *budgets]
    assert {row["method"] for row in written["rows"]} == {"unpatched", "top_k", "random", "uniform", "smaller input"}
    assert written["environment"]["inputs"] == "noise"
    assert written["environment"]["threads"] == 1
    assert float(printed[1]["flops_ratio"]) == pytest.approx(0.7, abs=0.05)


def test_a_budget_that_no_method_meets_is_a_failure(capsys, monkeypatch):
    monkeypatch.setitem(bench.__globals__, "measure", partial(measure, sample_seconds=0))
    command = ["bench", "--model", "small_vit:build", "--method", "top_k", "--flops", "0.12", "--json"]
    assert run(*command, *QUICK) == 1
    rows = Table.from_json(capsys.readouterr().out).rows
    assert [row["method"] for row in rows if row.get("flops_ratio") is not None] == ["unpatched", "smaller input"]


def test_bench_profiles(capsys, monkeypatch):
    monkeypatch.setitem(bench.__globals__, "measure", partial(measure, sample_seconds=0))
    command = ["bench", "--model", "small_vit:build", "--method", "tome", "--flops", "0.7", "--batch-size", "2"]
    assert run(*command, "--profile", "--json", *QUICK) == 0
    rows = {row["method"]: row for row in Table.from_json(capsys.readouterr().out).rows}
    assert "overhead" not in rows["unpatched"]
    for name in ("tome", "random"):
        row = rows[name]
        assert 0 < row["overhead_low"] <= row["overhead"] <= row["overhead_high"] < 5
        assert min(row["score"], row["select"], row["reduce"]) > 0


def test_eval_on_a_folder(capsys, pictures):
    command = ["eval", "--model", "small_vit:build", "--data", pictures, "--method", "top_k", "--keep", "0.5"]
    assert run(*command, "--json", *QUICK) == 0
    table = Table.from_json(capsys.readouterr().out)
    assert table.environment["images"] == 6
    assert [row["method"] for row in table.rows] == ["unpatched", "top_k", "random", "uniform", "smaller input"]
    assert all(0 <= row["top1"] <= 1 for row in table.rows)
    assert run(*command, "--samples", "2", "--batch-size", "1", "--json", *QUICK) == 0
    assert Table.from_json(capsys.readouterr().out).environment["images"] == 2


def test_viz_writes_a_picture(capsys, pictures, tmp_path):
    arguments = ["--method", "tome", "--keep", "0.5", "--image", pictures / "a" / "0.png"]
    assert run("viz", "--model", "small_vit:build", *arguments, "--output", tmp_path / "kept.png", *QUICK) == 0
    with Image.open(tmp_path / "kept.png") as sheet:
        assert sheet.width > 2 * 192
        assert len(sheet.getcolors(maxcolors=2**20)) > 3


def test_train_passes_its_options_on(monkeypatch, tmp_path):
    from tokenprune.evals import train_digits

    seen = []
    monkeypatch.setattr(train_digits, "train", lambda *given: seen.append(given) or {"test_accuracy": 0.5})
    assert run("train", "digits-vit", "--output", tmp_path, "--steps", "2") == 0
    assert run("train", "digits-vit", "--output", tmp_path) == 0
    assert seen == [(tmp_path, 2), (tmp_path, train_digits.STEPS)]


def test_help_imports_no_host_library():
    code = (
        "import sys\n"
        "from tokenprune import cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "wanted = {'timm', 'matplotlib', 'PIL', 'datasets', 'torchvision', 'skimage', 'sklearn', 'tokenprune.evals'}\n"
        "print(sorted(wanted & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "bench" in done.stdout


def test_evals_import_no_host_library():
    code = "import sys, tokenprune.evals; print(sorted({'timm', 'matplotlib', 'PIL', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_doctor_names_versions_kernels_and_why(capsys):
    assert run("doctor", "--json") == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["torch"]["found"] == torch.__version__.split("+")[0]
    assert rows["torch"]["state"] == "fine"
    assert rows["attention_mass, 257 tokens, 30 iterations"]["found"] == "tiled"
    assert rows["attention_mass, 257 tokens, 1 iteration"]["found"] == "tiled"
    assert rows["packed_attention"] == {
        "what": "packed_attention",
        "found": "per_length",
        "state": "fine",
        "why": "no kernel for ragged batches runs on a cpu",
    }
    assert all(row["why"] for row in rows.values())


def test_doctor_finds_what_is_too_old_and_what_is_not_there(monkeypatch, capsys):
    versions = {"torch": "2.14.1+cpu", "timm": "0.9.12", "diffusers": None}
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name, "99.0"))
    assert run("doctor", "--json") == 1
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["torch"]["state"] == "fine", "2.14 is not older than 2.6"
    assert rows["timm"]["state"] == "wrong"
    assert "pip install -U timm" in rows["timm"]["why"]
    assert rows["diffusers"]["state"] == "missing"


def test_report_is_that_of_the_patched_model(capsys):
    assert run("report", "--model", "digits-vit", "--method", "tome", "--flops", "0.6", *QUICK, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    model = load_model("digits-vit").model
    tokenprune.patch(model, "tome", flops=0.6)
    model(torch.zeros(1, 3, 80, 80))
    assert told == json.loads(json.dumps(tokenprune.report(model).to_dict()))
    assert run("report", "--model", "digits-vit", "--keep", "0.5", *QUICK) == 0
    shown = capsys.readouterr().out
    assert "was chosen for timm_vit" in shown
    assert run("report", "--model", "digits-vit", "--keep", "0.5", "--flops", "0.6", *QUICK) == 1
    assert "of one budget" in capsys.readouterr().err


def test_report_takes_a_searched_schedule(capsys, tmp_path):
    path = tmp_path / "schedule.json"
    StoredSchedule("top_k", {3: 0.5}).save(path)
    assert run("report", "--model", "digits-vit", "--schedule", path, *QUICK, "--json") == 0
    places = json.loads(capsys.readouterr().out)["places"]
    assert [(place["name"], place["tokens_out"]) for place in places] == [("blocks.3", 50)]


@pytest.mark.parametrize(
    ("typed", "offered"), [("tokenprune comp", {"compare "}), ("tokenprune eval --fl", {"--flops "})]
)
def test_a_shell_completes_commands_and_options(typed, offered, tmp_path):
    answer = tmp_path / "answer"
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "IFS": "\n"}
    environment = {**os.environ, **shell, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-m", "tokenprune.cli"], env=environment, check=True, capture_output=True)
    assert set(answer.read_text().split("\v")[0].splitlines()) <= offered
    assert answer.read_text().startswith(next(iter(offered)).strip())
