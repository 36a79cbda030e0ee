"""The command line: `tokenprune COMMAND`, see `tokenprune --help`.

Nothing but argparse is imported until a command runs, so that `--help` is quick and needs no extra.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from tokenprune.cli.commands import RECIPES, parser
from tokenprune.cli.examples import EXAMPLES

SHARED_OUT = ("eval", "search", "score")

__all__ = ["EXAMPLES", "RECIPES", "main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 for success, 1 for a failure told in one line on standard error, 2 for wrong usage."""
    known = parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(known)
    options = known.parse_args(arguments)
    if options.command == "train" and options.method is None and options.model not in RECIPES:
        parser().error(f"recipes are for {', '.join(RECIPES)}; for what a method learns for a model add --method ltmp")
    if options.command == "train" and options.method is None and (foreign := _of_methods(known, options)):
        known.error(f"{options.model} is trained by its recipe, which takes no {', '.join(foreign)}")
    from tokenprune.errors import TokenPruneError
    from tokenprune.evals.ranks import launched, ranks

    rank, count = launched()
    try:
        if options.command == "train" and options.method is not None:
            return _run(options)  # where accelerate knows the processes
        with ranks():
            if count > 1 and options.command not in SHARED_OUT:
                raise TokenPruneError(
                    f"{options.command} is of one process and was started in {count}; tokenprune"
                    f" {', '.join(SHARED_OUT)} and train --method run in several"
                )
            return _run(options)
    except (TokenPruneError, ImportError, OSError) as error:
        where = f" on rank {rank}" if count > 1 else ""
        print(f"tokenprune: error{where}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        print(f"tokenprune: error: out of memory: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _of_methods(known: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Options of `tokenprune train` that only the training of a method takes, as far as they were given."""
    plain = vars(known.parse_args(["train", options.model, "--output", options.output]))
    taken = ("steps", "threads", "quiet", "format", "flops", "data")  # the last two are refused with what would work
    given = [name for name, value in vars(options).items() if value != plain[name] and name not in taken]
    return [f"--{name.replace('_', '-')}" for name in given]


def _models(options: argparse.Namespace) -> list[str]:
    """The names of models that the options hold, but for a recipe's."""
    if options.command == "train" and options.method is None:
        return []
    given = vars(options)
    named = [given.get("model"), *(given.get("other") or ()), given.get("features")]
    return [one for each in named if each is not None for one in ([each] if isinstance(each, str) else each)]


def _run(options: argparse.Namespace) -> int:
    from tokenprune.evals import calibrate_command, commands, demo, doctor, report_command, search_command
    from tokenprune.evals.comparison.command import run_compare
    from tokenprune.evals.digits_denoisers import CHECKPOINTS as DIFFUSION
    from tokenprune.evals.digits_lvlm import LVLM
    from tokenprune.evals.model_kinds import refuse_kind
    from tokenprune.evals.patterns.command import run_patterns

    for name in _models(options):
        refuse_kind(name, "train --method" if options.command == "train" else options.command)
    if options.command in ("demo-diffusion", "score") or (
        options.command in ("bench", "eval") and options.model in DIFFUSION
    ):
        from tokenprune.evals import demo_diffusion, generation_commands

        return {
            "demo-diffusion": demo_diffusion.run,
            "score": generation_commands.score,
            "bench": generation_commands.run_bench,
            "eval": generation_commands.run_eval,
        }[options.command](options)
    if options.command == "eval" and options.model == LVLM:
        from tokenprune.evals import lvlm_commands

        return lvlm_commands.run_eval(options)
    kind, named, _ = (options.model or "").partition(":") if options.command == "eval" else ("", "", "")
    if named and kind in ("clip", "vlm", "pipe"):
        from tokenprune.evals import clip_commands, hub_commands

        run_kind = {
            "clip": clip_commands.run_eval,
            "vlm": hub_commands.eval_questions,
            "pipe": hub_commands.eval_prompts,
        }
        return run_kind[kind](options)
    if options.command == "train" and options.method is not None:
        from tokenprune.training import command

        return command.run(options)
    run: dict[str, Callable[[argparse.Namespace], int]] = {
        "demo": demo.run,
        "doctor": doctor.run_doctor,
        "methods": commands.methods,
        "report": report_command.run_report,
        "bench": commands.run_bench,
        "eval": commands.run_eval,
        "compare": run_compare,
        "viz": commands.viz,
        "patterns": run_patterns,
        "search": search_command.run_search,
        "calibrate": calibrate_command.run_calibrate,
        "train": commands.train,
    }
    return run[options.command](options)
