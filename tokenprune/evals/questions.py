"""Questions about images, from a file, to a vision-language model of transformers: what pruning costs its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import UNPATCHED, Budget
from tokenprune.evals.data import chosen
from tokenprune.evals.lvlm_arms import LvlmArm, lvlm_arms
from tokenprune.evals.progress import progress
from tokenprune.evals.ranks import ranks
from tokenprune.evals.reading import read_picture
from tokenprune.evals.records import read_records, texts
from tokenprune.evals.stats import bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.vqa_answers import MATCHES, exact_match, located, vqa_accuracy

QUESTION = '{"image": "cat.jpg", "question": "What colour is the cat?", "answers": ["black", "dark"]}'


@dataclass(frozen=True)
class Question:
    """text: about the picture in a file. answers: true ones, empty where a box (left, top, right, bottom) is asked
    for."""

    image: Path
    text: str
    answers: tuple[str, ...]
    box: tuple[float, ...] | None


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file of JSON lines such as QUESTION; `box`, in the place of `answers` or beside them, has four
    numbers in the units in which the model answers.

    Raises TokenPruneError for a file or a picture that is not there, and for questions without answers.
    """
    found = []
    for number, record in enumerate(read_records(path, QUESTION, ("image", "question")), 1):
        where, box = f"record {number} of {path}", record.get("box")
        answers = texts(record["answers"], f"answers of {where}") if record.get("answers") else []
        if box is not None and not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise TokenPruneError(f"box of {where} is {box!r}: left, top, right and bottom are needed")
        if not answers and box is None:
            raise TokenPruneError(f"{where} has no answers and no box; a record is such as {QUESTION}")
        found.append(
            Question(record["image"], str(record["question"]), tuple(answers), None if box is None else tuple(box))
        )
    return found


def load_lvlm(name: str) -> tuple[nn.Module, Any]:
    """Model and processor of a folder, or of a name on the Hugging Face hub, in eval mode.

    Raises TokenPruneError where they cannot be had.
    """
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise ImportError("this needs transformers: pip install 'tokenprune-torch[transformers]'") from error
    try:
        model = AutoModelForImageTextToText.from_pretrained(name)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise TokenPruneError(f"{name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    whole: nn.Module = model.eval()
    return whole, processor


def inputs_of(processor: Any, question: Question, model: nn.Module) -> dict[str, Tensor]:
    """What the model is given, as `prompt_inputs`."""
    return prompt_inputs(processor, read_picture(question.image), question.text, model)


def prompt_inputs(processor: Any, picture: Any, text: str, model: nn.Module) -> dict[str, Tensor]:
    """A PIL image and a question about it as the model is given them, by the processor's chat template, where it is.

    Raises TokenPruneError for a processor without one.
    """
    if getattr(processor, "chat_template", None) is None:
        raise TokenPruneError(
            "the processor has no chat template, which says how a question is put; set processor.chat_template, or use"
            " the checkpoint's instruction-tuned version"
        )
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = processor(images=picture, text=prompt, return_tensors="pt")
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype) if value.is_floating_point() else value.to(parameter.device)
        for name, value in given.items()
    }


@torch.inference_mode()
def ask(model: Any, processor: Any, question: Question, *, max_new_tokens: int) -> str:
    """The greedy answer of at most so many tokens."""
    inputs = inputs_of(processor, question, model)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    told: str = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return told.strip()


def evaluate_questions(
    model: nn.Module,
    processor: Any,
    questions: str | Path,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"keep": 0.25},),
    *,
    max_new_tokens: int = 32,
    samples: int | None = None,
    seed: int = 0,
    baselines: bool = True,
    show_progress: bool = False,
) -> Table:
    """Asks the questions of a file one by one, with every method at every budget; several processes share them out.

    model, processor: as `load_lvlm` gives. questions: see `read_questions`. methods, budgets, baselines: as in
    `tokenprune.evals.lvlm_arms.lvlm_arms`. max_new_tokens: of an answer. samples: drawn by `seed`.

    Columns, means with 95% bootstrap intervals over questions: `exact_match` with one of the true answers, normalised;
    `vqa_accuracy` where each question has at least four of them; `localisation`, boxes that overlap by a half; of each
    the `_drop` against the unpatched model, paired; `same_answer`, word for word, as the unpatched model's. `tokens`
    and `flops_ratio` are those of the first question.

    Raises TokenPruneError as `read_questions` and `lvlm_arms` do, and where another process has died.
    """
    with ranks() as processes:
        read = read_questions(questions)
        asked = [read[int(number)] for number in chosen(len(read), samples, seed)]
        arms = lvlm_arms(model, inputs_of(processor, asked[0], model), methods, budgets, baselines=baselines)
        own, parts = processes.own(asked), list[list[str | None]]()
        for question in progress(own, "questions", show=show_progress and processes.is_main):
            told = partial(ask, processor=processor, question=question, max_new_tokens=max_new_tokens)
            parts.append([None if arm.model is None else told(arm.model) for arm in arms])

        def table(whole: list[list[str | None]]) -> Table:
            told = [[answers[arm] for answers in whole] for arm in range(len(arms))]
            base = _scores(asked, told[0])
            rows = []
            for arm, answers in zip(arms, told, strict=True):
                row = _identity(arm)
                if arm.model is not None:
                    row |= _cells(_scores(asked, answers), None if answers is told[0] else base, seed)
                    same = torch.tensor([a == b for a, b in zip(answers, told[0], strict=True)])
                    row |= interval_cells("same_answer", bootstrap_mean(same, support=(0.0, 1.0), seed=seed))
                rows.append({**row, "note": arm.note})
            parameter = next(model.parameters())
            conditions: Row = {"data": Path(questions).name, "questions": len(asked)}
            return Table(rows, conditions | processes.conditions() | environment(parameter.device, parameter.dtype))

        return processes.joined(parts, table)


def _scores(asked: Sequence[Question], answers: Sequence[str | None]) -> dict[str, Tensor]:
    """{column: [questions that it is of]}."""
    both = [(question, answer or "") for question, answer in zip(asked, answers, strict=True)]
    named = [(answer, question.answers) for question, answer in both if question.answers]
    boxes = [(answer, question.box) for question, answer in both if question.box is not None]
    found = {"exact_match": [exact_match(*one) for one in named], "localisation": [located(*one) for one in boxes]}
    if named and all(len(truths) > MATCHES for _, truths in named):
        found["vqa_accuracy"] = [vqa_accuracy(*one) for one in named]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items() if values}


def _cells(scores: dict[str, Tensor], base: dict[str, Tensor] | None, seed: int) -> Row:
    row: Row = {}
    for name, values in scores.items():
        row |= interval_cells(name, bootstrap_mean(values, support=(0.0, 1.0), seed=seed))
        if base is not None:
            drop = bootstrap_mean(base[name] - values, support=(-1.0, 1.0), seed=seed)
            row |= interval_cells(f"{name}_drop", drop)
    return row


def _identity(arm: LvlmArm) -> Row:
    told: Row = {"method": arm.method, "budget": arm.budget, "positions": arm.positions}
    return {**told, "tokens": None if arm.method == UNPATCHED else arm.tokens, "flops_ratio": arm.flops_ratio}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
