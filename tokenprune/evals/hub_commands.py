"""`tokenprune eval` of models of transformers and diffusers on files of questions and of prompts."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Budget
from tokenprune.evals.commands import budgets, check_output, finish, refuse_foreign, set_machine
from tokenprune.evals.prompts import evaluate_prompts, load_pipeline
from tokenprune.evals.questions import QUESTION, evaluate_questions, load_lvlm

VLM = "vlm:"
PIPE = "pipe:"
KEEP: Budget = {"keep": 0.25}
FLOPS: Budget = {"flops": 0.8}


def eval_questions(options: argparse.Namespace) -> int:
    """`tokenprune eval --model vlm:NAME --data questions.jsonl`"""
    check_output(options)
    refuse_foreign(options, ("max_new_tokens",))
    if options.data is None:
        raise TokenPruneError(f"{options.model} needs --data FILE.jsonl with questions, lines such as {QUESTION}")
    set_machine(options)
    model, processor = load_lvlm(options.model.removeprefix(VLM))
    model.to(options.device, getattr(torch, options.dtype))
    table = evaluate_questions(
        model,
        processor,
        options.data,
        options.method,
        budgets(options, [KEEP]),
        samples=options.samples,
        seed=options.seed,
        show_progress=not options.quiet,
        **_given(options, "max_new_tokens"),
    )
    return finish(table, options)


def eval_prompts(options: argparse.Namespace) -> int:
    """`tokenprune eval --model pipe:NAME --data prompts.txt`"""
    check_output(options)
    refuse_foreign(options, ("steps", "guidance", "clip", "lpips"))
    if options.data is None:
        raise TokenPruneError(f"{options.model} needs --data FILE.txt with prompts, one a line")
    set_machine(options)
    pipe = load_pipeline(options.model.removeprefix(PIPE)).to(options.device, getattr(torch, options.dtype))
    table = evaluate_prompts(
        pipe,
        options.data,
        options.method,
        budgets(options, [FLOPS]),
        samples=options.samples,
        seed=options.seed,
        show_progress=not options.quiet,
        **_given(options, "steps", "guidance", "clip", "lpips"),
    )
    return finish(table, options)


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}
