"""The command of the command line for the small vision-language model."""

from __future__ import annotations

import argparse

from torch import nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Budget
from tokenprune.evals.commands import budgets, check_output, finish, refuse_foreign, set_machine
from tokenprune.evals.digits_lvlm import lvlm_digits
from tokenprune.evals.lvlm_eval import evaluate_lvlm

KEEP: Budget = {"keep": 0.25}


def run_eval(options: argparse.Namespace) -> int:
    """`tokenprune eval --model lvlm-digits`"""
    check_output(options)
    table = evaluate_lvlm(
        load_digits(options),
        options.method,
        budgets(options, [KEEP]),
        samples=options.samples or 75,
        batch_size=options.batch_size,
        seed=options.seed,
        rounds=options.rounds,
        show_progress=not options.quiet,
    )
    return finish(table, options)


def load_digits(options: argparse.Namespace) -> nn.Module:
    """The model that the options name."""
    set_machine(options)
    foreign = ("data", "split", "steps", "guidance")
    given = [f"--{name}" for name in foreign if getattr(options, name, None) is not None]
    if options.random_weights:
        given.append("--random-weights")
    if given or options.device != "cpu" or options.dtype != "float32":
        raise TokenPruneError(
            f"{options.model} draws its pictures and is evaluated in float32 on the CPU; it takes no"
            f" {', '.join(given or ['--device, --dtype'])}"
        )
    refuse_foreign(options, ("rounds",))
    return lvlm_digits(options.checkpoint)
