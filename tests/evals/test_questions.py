"""Questions and prompts from files: answers against cases by hand, models against loops over their own calls."""

import json

import pytest
import torch
from PIL import Image
from tiny_hub import save_clip, save_lvlm, save_pipeline

import tokenprune
from tokenprune import cli
from tokenprune.errors import TokenPruneError
from tokenprune.evals import digits_lvlm
from tokenprune.evals.placed_digits import placed_digits
from tokenprune.evals.prompts import evaluate_prompts, load_pipeline
from tokenprune.evals.questions import ask, evaluate_questions, inputs_of, load_lvlm, read_questions
from tokenprune.evals.vqa_answers import box_iou, box_of, exact_match, located, normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A dog.", "dog"),
        ("the Dogs!", "dogs"),
        ("Two", "2"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("don't know", "dont know"),
        ("black-and-white", "black and white"),
        ("None", "0"),
        ("  yes,\n sir ", "yes sir"),
    ],
)
def test_answers_that_are_the_same(one, other):
    assert normalised(one) == other
    assert exact_match(one, ["cat", other.upper()]) == 1.0
    assert exact_match(one, ["cat"]) == 0.0


def test_nothing_is_not_the_choice_a():
    for answer in ("", ".", "the"):
        assert exact_match(answer, ["A"]) == vqa_accuracy(answer, ["A"] * 4) == 0.0
    assert exact_match("a.", ["A"]) == exact_match("A cat", ["cat"]) == 1.0


def test_vqa_accuracy_leaves_out_each_answer_in_turn():
    """With ten answers: 0, 0.3, 0.6, 0.9 and 1 for no, one, two, three and more people who say the same."""
    for equal, expected in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        truths = ["The cat"] * equal + ["dog"] * (10 - equal)
        assert vqa_accuracy("cat", truths) == pytest.approx(expected)


def test_boxes():
    assert box_of("x: 1, y: -2.5 to (30, 40), 9") == (1.0, -2.5, 30.0, 40.0)
    assert box_of("1, 2 and 3") is None
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == box_iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
    assert located("[0, 0, 2, 2]", (0, 0, 2, 3)) == 1.0
    assert located("[0, 0, 2, 2]", (1, 0, 3, 2)) == located("nowhere", (0, 0, 1, 1)) == 0.0


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The package's small LLaVA as transformers would load any, and questions about its pictures."""
    folder = tmp_path_factory.mktemp("lvlm")
    save_lvlm(folder)
    scenes, records = placed_digits("test", 6), []
    for number, (digits, rows, columns) in enumerate(zip(scenes.digits, scenes.rows, scenes.columns, strict=True)):
        Image.fromarray(scenes.pictures[number]).save(folder / f"{number}.png")
        words_of = sorted(digits.tolist())
        answer = " ".join(digits_lvlm.DIGIT_WORDS[d] for d in words_of)
        record = {"image": f"{number}.png", "question": "what is ?", "answers": answer}
        place = f"{digits_lvlm.ROW_WORDS[rows[0]]} {digits_lvlm.COLUMN_WORDS[columns[0]]}"
        where = {"question": f"where is {digits_lvlm.DIGIT_WORDS[digits[0]]}", "answers": [place, "x", "y", "z"]}
        records.append(record if number % 2 else {**record, **where})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def test_questions_are_asked_as_by_hand(asked):
    model, processor = load_lvlm(str(asked))
    table = evaluate_questions(
        model, processor, asked / "questions.jsonl", ["top_k"], [{"keep": 0.25}], baselines=False, max_new_tokens=3
    )
    rows = {(row["method"], row["positions"]): row for row in table.rows}
    questions = read_questions(asked / "questions.jsonl")
    told = [ask(model, processor, question, max_new_tokens=3) for question in questions]
    with torch.no_grad(), tokenprune.patched(model, "top_k", keep=0.25):
        pruned = [ask(model, processor, question, max_new_tokens=3) for question in questions]
    for answers, row in ((told, rows["unpatched", ""]), (pruned, rows["top_k", "original"])):
        right = [exact_match(answer, question.answers) for answer, question in zip(answers, questions, strict=True)]
        assert row["exact_match"] == pytest.approx(sum(right) / 6)
        assert row["same_answer"] == pytest.approx(sum(a == b for a, b in zip(answers, told, strict=True)) / 6)
    assert rows["unpatched", ""]["exact_match"] >= 0.5, "the model reads its pictures"
    drop = rows["unpatched", ""]["exact_match"] - rows["top_k", "original"]["exact_match"]
    assert rows["top_k", "original"]["exact_match_drop"] == pytest.approx(drop)
    assert rows["top_k", "original"]["tokens"] == 16
    assert "vqa_accuracy" not in rows["unpatched", ""], "some questions have one answer"
    given = inputs_of(processor, questions[0], model)
    assert (given["input_ids"] == digits_lvlm.token("<image>")).sum() == digits_lvlm.VISUAL_TOKENS


def run(capsys, *arguments):
    code = cli.main(["eval", *map(str, arguments), "--quiet", "--threads", "1", "--json"])
    printed, error = capsys.readouterr()
    return (json.loads(printed) if code == 0 else None), error


@pytest.mark.full
def test_questions_on_the_command_line(asked, capsys):
    model = ["--model", f"vlm:{asked}", "--method", "top_k", "--keep", "0.25", "--samples", "2"]
    table, _ = run(capsys, *model, "--data", asked / "questions.jsonl", "--max-new-tokens", "2")
    assert {row["method"] for row in table["rows"]} == {"unpatched", "top_k", "random", "uniform"}
    assert table["environment"]["questions"] == 2


def test_wrong_questions_on_the_command_line(asked, capsys):
    model = ["--model", f"vlm:{asked}", "--method", "top_k", "--keep", "0.25", "--samples", "2"]
    for arguments, message in (
        (model, "--data FILE.jsonl"),
        ([*model, "--data", asked / "none.jsonl"], "cannot be read"),
        ([*model, "--data", asked / "questions.jsonl", "--clip", "x"], "--clip: only for pipe:NAME"),
        (["--model", f"vlm:{asked / 'x'}", "--data", asked / "questions.jsonl"], "could not be loaded"),
        (["--model", "digits-vit", "--max-new-tokens", "3"], "--max-new-tokens: only for vlm:NAME"),
    ):
        _, error = run(capsys, *arguments)
        assert message in error, error


def test_questions_without_answers_or_template_are_told(asked, tmp_path):
    path, picture = tmp_path / "q.jsonl", str(asked / "0.png")
    for record, message in (
        ({"question": "what?"}, "has no answers and no box"),
        ({"question": "what?", "answers": []}, "has no answers and no box"),
        ({"question": "what?", "answers": 3}, "a text or a list of texts"),
        ({"question": "where?", "box": [1, 2, 3]}, "left, top, right and bottom"),
        ({"question": "", "answers": ["x"]}, "has no question"),
    ):
        path.write_text(json.dumps({"image": picture, **record}))
        with pytest.raises(TokenPruneError, match=message):
            read_questions(path)
    path.write_text(json.dumps({"image": picture, "question": "where is two", "box": [0, 0, 1, 1]}))
    [question] = read_questions(path)
    model, processor = load_lvlm(str(asked))
    processor.chat_template = None
    with pytest.raises(TokenPruneError, match="chat template"):
        inputs_of(processor, question, model)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A tiny Stable Diffusion with a text encoder, in a folder, and its prompts."""
    folder = tmp_path_factory.mktemp("pipe")
    (folder / "clip").mkdir()
    save_clip(folder / "clip")
    save_pipeline(folder / "pipe", folder / "clip")
    (folder / "prompts.txt").write_text("a red fox\n\nan old house\na blue bird\n")
    return folder


def test_prompts_are_drawn_as_by_hand(drawn):
    pipe = load_pipeline(str(drawn / "pipe"))
    size = {"height": 32, "width": 24}
    table = evaluate_prompts(
        pipe,
        drawn / "prompts.txt",
        ["tomesd"],
        [{"flops": 0.9}],
        steps=2,
        seed=5,
        guidance=2.0,
        clip=str(drawn / "clip"),
        **size,
    )
    rows = {row["method"]: row for row in table.rows}
    assert list(rows)[:2] == ["unpatched", "tomesd"]
    assert {"random", "uniform"} <= rows.keys()
    pictures = {}
    for name in ("unpatched", "tomesd"):
        if name != "unpatched":
            tokenprune.patch(pipe, name, flops=0.9)
        settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt", **size}
        lines = ["a red fox", "an old house", "a blue bird"]
        noise = [torch.Generator().manual_seed(5 + number) for number in range(3)]
        pictures[name] = [pipe(p, generator=g, **settings).images for p, g in zip(lines, noise, strict=True)]
    errors = [(a - b).double().square().mean() for a, b in zip(*pictures.values(), strict=True)]
    assert rows["tomesd"]["psnr"] == pytest.approx(float(-10 * torch.stack(errors).log10().mean()), rel=1e-4)
    assert 0 < rows["tomesd"]["ssim"] < 1
    assert "psnr" not in rows["unpatched"]
    assert 0 <= rows["tomesd"]["clip_score"] <= 1
    drop = rows["unpatched"]["clip_score"] - rows["tomesd"]["clip_score"]
    assert rows["tomesd"]["clip_score_drop"] == pytest.approx(drop)
    assert rows["tomesd"]["flops_ratio"] == pytest.approx(0.9, abs=0.01)


def test_prompts_on_the_command_line(drawn, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    model = ["--model", f"pipe:{drawn / 'pipe'}"]
    for arguments, message in (
        (model, "--data FILE.txt"),
        ([*model, "--data", tmp_path / "empty.txt"], "is empty; it should have one of the prompts a line"),
        ([*model, "--data", tmp_path / "none.txt"], "cannot be read"),
        ([*model, "--data", drawn / "prompts.txt", "--classes", "x"], "--classes: only for clip:NAME"),
        ([*model, "--data", drawn / "prompts.txt", "--clip", drawn, "--steps", "1"], "could not be loaded"),
        (["--model", f"pipe:{drawn}", "--data", drawn / "prompts.txt"], "could not be loaded"),
    ):
        _, error = run(capsys, *arguments)
        assert message in error, error
