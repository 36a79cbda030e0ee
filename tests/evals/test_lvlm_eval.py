import json
from importlib import resources

import pytest
import torch
from safetensors.torch import load

import tokenprune
from tokenprune import cli
from tokenprune.evals import digits_lvlm, lvlm_bench, lvlm_eval, train_lvlm
from tokenprune.evals.arms import UNPATCHED
from tokenprune.evals.lvlm_arms import LvlmArm, lvlm_arms
from tokenprune.evals.lvlm_bench import decode
from tokenprune.evals.lvlm_eval import answer, draw_questions, evaluate_lvlm, generated
from tokenprune.evals.placed_digits import placed_digits
from tokenprune.evals.stats import Interval
from tokenprune.evals.throughput import Timing

CHECKPOINTS = resources.files("tokenprune.evals") / "checkpoints"


@pytest.fixture(scope="module")
def model():
    return digits_lvlm.lvlm_digits()


@pytest.fixture(scope="module")
def questions():
    return draw_questions(60)


def test_the_checkpoint_is_small_and_its_record_is_that_of_the_committed_recipe():
    stored = (CHECKPOINTS / digits_lvlm.CHECKPOINT).read_bytes()
    assert len(stored) <= 4_000_000
    assert {value.dtype for value in load(stored).values()} == {torch.float16}
    record = json.loads((CHECKPOINTS / digits_lvlm.CHECKPOINT).with_suffix(".json").read_text())
    assert record["recipe"] == train_lvlm.recipe_record(train_lvlm.RECIPE)
    assert record["data"]["licence"] == "CC BY 4.0"
    assert record["log"][-1]["step"] == train_lvlm.RECIPE.steps


def test_the_shipped_model_names_and_finds(model, questions):
    assert model.config.text_config.num_hidden_layers >= 8
    found = answer(LvlmArm(UNPATCHED, "", model), questions)
    assert found.recognised.mean() >= 0.85
    assert found.localised.mean() >= 0.65
    # 64 visual tokens, the start and a question of three: keys and values of 8 layers, 96 floats each.
    assert found.cache_bytes == 68 * 8 * 2 * 96 * 4


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("top_k", {}),
        ("fopru", {}),
        ("divprune", {}),
        ("cdpruner", {}),
        ("pool", {}),
        ("zero_tprune", {}),
        ("zero_tprune_uni", {}),
        ("visionzip", {"start_layer": 0}),
        ("prumerge", {"start_layer": 0}),
    ],
)
def test_a_quarter_of_the_tokens_keeps_nine_tenths_of_recognition(model, method, options):
    """On scans that the choice of layers was made on; the tests' own are measured for the docs."""
    scenes = placed_digits("val", 120)
    ids = digits_lvlm.prompts(digits_lvlm.what_is_there(120))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": digits_lvlm.to_model(scenes)}
    asked = digits_lvlm.names(torch.from_numpy(scenes.digits))[:, :-1]

    def recognised():
        named = generated(model, inputs, asked.shape[1])
        return (asked.unsqueeze(2) == named.unsqueeze(1)).any(2).double().mean()

    whole = recognised()
    with tokenprune.patched(model, method, keep=0.25, **options):
        assert recognised() >= 0.9 * whole


def test_questions_are_about_what_the_pictures_show(questions):
    scenes = [placed_digits("test", 20, seed) for seed in range(3)]
    expected = torch.cat([digits_lvlm.to_model(part) for part in scenes])
    assert torch.equal(questions.images, expected)
    for i in (0, 25, 59):
        scene, row = scenes[i // 20], i % 20
        names = [digits_lvlm.DIGIT_WORDS[digit] for digit in sorted(scene.digits[row])]
        assert digits_lvlm.words(questions.what[i]) == "what is ?"
        assert digits_lvlm.words(questions.digits[i]) == " ".join(names)
        assert digits_lvlm.words(questions.where[i]) == f"where is {digits_lvlm.DIGIT_WORDS[scene.digits[row, 0]]}"
        place = f"row_{scene.rows[row, 0] + 1} column_{scene.columns[row, 0] + 1}"
        assert digits_lvlm.words(questions.places[i]) == place


def test_a_row_tells_what_the_patched_model_does(model, questions):
    few = questions.first(12)
    arms = lvlm_arms(model, lvlm_eval.example_batch(few, 2), ["top_k"], baselines=False)
    assert [(arm.method, arm.positions, arm.tokens) for arm in arms[1:]] == [
        ("top_k", "original", 16),
        ("top_k", "reindex", 16),
    ]
    found = answer(arms[2], few, batch_size=5)
    with tokenprune.patched(model, "top_k", keep=0.25, positions="reindex"), tokenprune.record(model) as recording:
        for i in range(12):
            inputs = {"input_ids": digits_lvlm.prompts(few.where[i : i + 1]), "pixel_values": few.images[i : i + 1]}
            ids = generated(model, inputs, 2)
            assert found.localised[i] == float(torch.equal(ids, few.places[i : i + 1]))
            kept = recording.forwards[-1].places[-1].kept
            assert found.vertical[i] == pytest.approx((kept // 8 + 0.5).double().mean().item() / 8)
    assert found.cache_bytes == 20 * 8 * 2 * 96 * 4


def test_methods_between_layers_are_compared_at_the_flops_of_fastv(model, questions):
    example = lvlm_eval.example_batch(questions, 2)
    arms = lvlm_arms(model, example, ["fastv", "feather", "pyramid_drop"], baselines=False)
    names = [arm.method for arm in arms]
    assert names == [
        "unpatched", "fastv", "feather", "feather, with rotary", "feather, no grid", "feather, no grid, with rotary",
        "pyramid_drop",
    ]  # fmt: skip
    assert arms[1].tokens == 16
    assert [arm.note for arm in arms] == [None] * len(arms)
    for arm in arms[2:]:
        assert arm.flops_ratio == pytest.approx(arms[1].flops_ratio, abs=0.011)


def test_a_step_of_decoding_can_be_repeated(model, questions):
    inputs = lvlm_eval.example_batch(questions, 3)
    with tokenprune.patched(model, "feather", keep=0.25):
        step = decode(model, inputs)
        first, again = step().logits, step().logits
        ids = generated(model, inputs, 2)
    assert torch.equal(first, again)
    assert torch.equal(first[:, -1].argmax(-1), ids[:, 1])


def test_the_command_prints_a_row_for_each_method_and_both_positions(model, capsys, monkeypatch):
    quick = ["--quiet", "--samples", "6", "--method", "fopru", "--method", "fastv"]
    assert cli.main(["eval", "--model", "lvlm-digits", *quick, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    rows = [(row["method"], row["positions"]) for row in table["rows"]]
    both = ("fopru", "fopru, rows", "fopru, class token", "random", "uniform")
    assert set(rows) == {("unpatched", ""), ("fastv", "original")} | {
        (name, positions) for name in both for positions in ("original", "reindex")
    }
    assert {"recognition_drop", "localisation_drop_low", "vertical", "cache_bytes"} <= set(table["rows"][1])
    assert table["environment"]["questions"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--data", "folder"], "takes no --data"),
        (["eval", "--random-weights"], "takes no --random-weights"),
        (["eval", "--checkpoint", "folder"], "tokenprune train lvlm-digits --output FOLDER"),
        (["bench"], "tokenprune eval --model lvlm-digits --rounds 20"),
        (["viz"], "tokenprune eval --model lvlm-digits --rounds 20"),
    ],
)
def test_what_does_not_belong_is_refused(arguments, message, capsys):
    assert cli.main([arguments[0], "--model", "lvlm-digits", *arguments[1:]]) == 1
    assert message in capsys.readouterr().err


def test_times_are_of_prompts_and_of_tokens_behind_them(model, monkeypatch):
    lengths = []

    def measure(*works, rounds, attempts, seed):
        lengths.append([work().past_key_values.get_seq_length(3) for work in works])
        return Timing(
            rounds, 1, 1.0, 1.0, Interval(float(len(lengths)), 0.5, 9.0), 1.0, len(lengths) == 1, 1, None, None
        )

    monkeypatch.setattr(lvlm_bench, "measure", measure)
    rows = evaluate_lvlm(model, ["fastv"], samples=2, baselines=False, rounds=20).rows
    # The prompt has 68 tokens, 20 of them in layers behind fastv's; decoding goes on behind it, once and again.
    assert lengths == [[68, 20, 68]] * 2
    assert (rows[1]["prefill_speedup"], rows[1]["decode_speedup"], rows[1]["trusted"]) == (1.0, 2.0, False)
    assert rows[1]["decode_speedup_high"] == 9.0
    assert "prefill_speedup" not in rows[0]
