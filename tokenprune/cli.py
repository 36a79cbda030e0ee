"""The command line: `tokenprune demo | demo-diffusion | methods | bench | eval | viz | patterns | search |
score | train`.

Nothing but argparse is imported until a command runs, so that `--help` is quick and needs no extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

EXAMPLES = {
    "demo": ["tokenprune demo --output demo-output"],
    "demo-diffusion": ["tokenprune demo-diffusion --checkpoint dit-run --checkpoint unet-run"],
    "methods": ["tokenprune methods", "tokenprune methods --model digits-vit --markdown", "tokenprune methods --table"],
    "bench": [
        "tokenprune bench --model digits-vit --flops 0.6 --batch-size 1 --batch-size 16",
        "tokenprune bench --model vit_small_patch16_224 --random-weights --method tome --flops 0.6 --json",
        "tokenprune bench --model dinov2-small-wheel --batch-size 16 --method tome --flops 0.6 --profile",
        "tokenprune bench --model digits-vit --flops 0.6 --batch-size 1 --batch-size 16 --save-profile",
    ],
    "eval": [
        "tokenprune eval --model digits-vit --method tome --method zero_tprune --flops 0.6",
        "tokenprune eval --model dinov2-small-wheel --flops 0.6 --output dinov2.md",
        "tokenprune eval --model deit_small_patch16_224 --data imagenet/val --samples 5000 --flops 0.6 --csv",
        "tokenprune eval --model dit-digits --checkpoint dit-run --flops 0.7 --rounds 20",
        "tokenprune eval --model lvlm-digits --keep 0.25 --keep 0.5 --rounds 20",
    ],
    "viz": ["tokenprune viz --model digits-vit --method tome --flops 0.6 --output kept.png"],
    "patterns": [
        "tokenprune patterns --model digits-vit --keep 0.5 --keep 0.25 --output patterns",
        "tokenprune patterns --model dinov2-small-wheel --method top_k --method tome --measure kept --output patterns",
        "tokenprune patterns --model vit_tiny_patch16_224 --other vit_small_patch16_224 --data pictures --keep 0.5"
        " --output patterns",
    ],
    "search": [
        "tokenprune search --model digits-vit --method top_k --flops 0.6 --output found",
        "tokenprune search --model dinov2-small-wheel --method tome --speedup 1.5 --threads 2 --output found",
        "tokenprune search --model digits-swin --method sparsevit --speedup 1.3 --output found",
        "tokenprune search --model deit_small_patch16_224 --data pictures --method tome --min-agreement 0.99"
        " --output found",
    ],
    "score": ["tokenprune score --pictures patched --real coco-val --prompts captions.txt"],
    "train": [
        "tokenprune train digits-vit --output digits-run",
        "tokenprune train digits-swin --output swin-run",
        "tokenprune train dit-digits --output dit-run",
        "tokenprune train lvlm-digits --output lvlm-run",
        "tokenprune train digit-masks --output masks-run",
        "tokenprune train digits-vit --method ltmp --flops 0.6 --batch-size 32 --output digits-ltmp",
        "tokenprune train digits-vit --method dynamicvit --flops 0.6 --epochs 4 --batch-size 32 --output dynamicvit",
        "tokenprune train digits-vit --method tnt --option noise=0.3 --flops 0.6 --batch-size 32 --output tnt",
        "tokenprune train digit-masks --method cropr --flops 0.5 --batch-size 32 --epochs 2 --output masks-cropr",
        "tokenprune train deit_small_patch16_224 --method ltmp --data imagenet/train --flops 0.75 --output deit-ltmp",
    ],
}

RECIPES = ("digits-vit", "digits-swin", "dit-digits", "unet-digits", "lvlm-digits", "digit-reader", "digit-masks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 for success, 1 for a failure told in one line on standard error, 2 for wrong usage."""
    options = parser().parse_args(arguments)
    if options.command == "train" and options.method is None and options.model not in RECIPES:
        parser().error(f"recipes are for {', '.join(RECIPES)}; for what a method learns for a model add --method ltmp")
    from tokenprune.errors import TokenPruneError

    try:
        return _run(options)
    except (TokenPruneError, ImportError, OSError) as error:
        print(f"tokenprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="tokenprune",
        description="Make a pretrained vision transformer compute fewer tokens, and measure what that gives and costs.",
        epilog="tokenprune COMMAND --help has examples for each command.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "every method on the shipped ViT: a table and two pictures, computed now")
    demo.add_argument("--output", default="demo-output", metavar="FOLDER", help="where to write (default: %(default)s)")
    demo.add_argument("--samples", type=_positive, default=500, help="test pictures (default: %(default)s)")
    _add_machine(demo)

    drawn = _command(commands, "demo-diffusion", "a grid of pictures, unpatched and each method from the same noise")
    drawn.add_argument(
        "--output", default="demo-diffusion-output", metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    drawn.add_argument(
        "--checkpoint",
        action="append",
        metavar="FOLDER",
        help="where tokenprune train wrote dit-digits or unet-digits; repeatable (default: the package's, if any)",
    )
    drawn.add_argument("--samples", type=_positive, default=30, help="pictures a row (default: %(default)s)")
    _add_machine(drawn)

    methods = _command(commands, "methods", "the methods, or those that fit a model")
    _add_model(methods, required=False)
    methods.add_argument(
        "--table",
        action="store_true",
        help="put every method on a tiny model of each family: the table, Markdown or JSON",
    )
    _add_format(methods)

    bench = _command(commands, "bench", "speed, FLOPs and memory, patched and unpatched interleaved in one process")
    _add_model(bench)
    _add_methods(bench)
    bench.add_argument(
        "--batch-size", type=_positive, action="append", metavar="N", help="images a forward; repeatable (default: 8)"
    )
    bench.add_argument("--rounds", type=_positive, default=20, help="timed rounds, at least 20 (default: %(default)s)")
    bench.add_argument(
        "--profile", action="store_true", help="also what share of the time scoring, selecting and reducing take"
    )
    bench.add_argument(
        "--save-profile",
        action="store_true",
        help="store a latency table for this model, device, dtype and threads, by which patch warns of a slowdown",
    )
    _add_generation(bench)
    _add_data(bench, "what to time on (default: the model's own images, else noise)")
    _add_machine(bench)
    _add_format(bench)

    evaluate = _command(
        commands,
        "eval",
        "accuracy and fidelity to the unpatched model; of diffusion models their pictures, of the"
        " vision-language model its answers",
    )
    _add_model(evaluate)
    _add_methods(evaluate)
    _add_data(evaluate, "what to evaluate on (default: the model's own images)")
    evaluate.add_argument(
        "--samples", type=_positive, help="images, drawn by --seed (default: all; digits: 1000; lvlm-digits: 75)"
    )
    evaluate.add_argument("--batch-size", type=_positive, default=32, help="(default: %(default)s)")
    evaluate.add_argument("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    evaluate.add_argument(
        "--rounds", type=_positive, help="dit-digits, unet-digits, lvlm-digits: time every row too, at least 20 rounds"
    )
    _add_generation(evaluate)
    _add_machine(evaluate)
    _add_format(evaluate)

    viz = _command(commands, "viz", "which patches survive, drawn over the image, place by place")
    _add_model(viz)
    _add_methods(viz)
    viz.add_argument("--image", action="append", metavar="FILE", help="repeatable (default: the model's own images)")
    viz.add_argument("--places", type=_positive, default=6, help="at most so many a row (default: %(default)s)")
    viz.add_argument("--output", default="kept.png", metavar="FILE", help="(default: %(default)s)")
    _add_machine(viz)

    patterns = _command(
        commands, "patterns", "which tokens methods, budgets and models have in common, and whether that tells accuracy"
    )
    _add_model(patterns)
    _add_methods(patterns)
    _add_data(patterns, "what to compare on (default: the model's own images)")
    patterns.add_argument("--other", action="append", metavar="MODEL", help="to compare with on that grid; repeatable")
    patterns.add_argument(
        "--measure",
        action="append",
        choices=["kept", "clusters", "depth", "features"],
        help="repeatable (default: all)",
    )
    patterns.add_argument(
        "--anchor", action="append", metavar="METHOD", help="whom to compare all with (default: top_k, k_medoids)"
    )
    patterns.add_argument("--samples", type=_positive, default=300, help="images, by --seed (default: %(default)s)")
    patterns.add_argument("--batch-size", type=_positive, default=32, help="(default: %(default)s)")
    patterns.add_argument("--resamples", type=_positive, default=1000, help="of the bootstrap (default: %(default)s)")
    patterns.add_argument(
        "--output", required=True, metavar="FOLDER", help="for the tables (.md, .csv, .json) and the plots"
    )
    _add_machine(patterns)

    search = _command(commands, "search", "the schedule of a method that suits a model best, from unlabelled images")
    _add_model(search)
    search.add_argument("--method", required=True, metavar="NAME", help="whose schedule, see tokenprune methods")
    goal = search.add_mutually_exclusive_group(required=True)
    goal.add_argument("--flops", type=float, metavar="SHARE", help="of the multiply-adds: the best schedule there")
    goal.add_argument("--speedup", type=float, metavar="TIMES", help="measured here: the best schedule so fast")
    goal.add_argument("--min-agreement", type=float, metavar="SHARE", help="with the unpatched model: the fastest then")
    _add_data(search, "what to search on (default: images of the model's own that eval does not take)")
    search.add_argument("--samples", type=_positive, default=64, help="images (default: %(default)s)")
    search.add_argument("--batch-size", type=_positive, default=8, help="of what is timed (default: %(default)s)")
    search.add_argument("--candidates", type=_positive, default=200, help="schedules to try (default: %(default)s)")
    search.add_argument("--strategy", choices=["evolution", "monte_carlo"], default="evolution")
    search.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="for schedule.json and the state, from which a killed search goes on",
    )
    _add_machine(search)

    score = _command(commands, "score", "Inception FID and CLIP score of pictures from a full-size diffusion model")
    score.add_argument("--pictures", required=True, metavar="FOLDER", help="generated, by name in the prompts' order")
    score.add_argument("--real", metavar="FOLDER", help="real pictures: FID, by torch-fidelity")
    score.add_argument("--inception", metavar="FILE", help="weights of its Inception (default: downloaded)")
    score.add_argument("--prompts", metavar="FILE", help="one line a picture: CLIP score, by transformers")
    score.add_argument("--clip", default="openai/clip-vit-large-patch14", help="name or folder (default: %(default)s)")
    _add_format(score)

    train = _command(commands, "train", "what a method learns for a model, or a model of the package by its recipe")
    train.add_argument(
        "model",
        help=f"by its recipe: {', '.join(RECIPES)}; with --method: digits-vit, a timm name, owner/name on the Hugging"
        " Face hub or module:function",
    )
    train.add_argument("--output", required=True, metavar="FOLDER", help="for the checkpoint and its record")
    train.add_argument("--steps", type=_positive, help="of a recipe, other than its own only to try the command out")
    train.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: %(default)s)")
    _add_training(train)
    return top


def _run(options: argparse.Namespace) -> int:
    from tokenprune.evals import commands, demo, search_command
    from tokenprune.evals.digits_denoisers import CHECKPOINTS as DIFFUSION
    from tokenprune.evals.digits_lvlm import LVLM
    from tokenprune.evals.patterns.command import run_patterns

    if options.command in ("demo-diffusion", "score") or (
        options.command in ("bench", "eval", "viz") and options.model in DIFFUSION
    ):
        from tokenprune.evals import demo_diffusion, generation_commands

        return {
            "demo-diffusion": demo_diffusion.run,
            "score": generation_commands.score,
            "bench": generation_commands.run_bench,
            "eval": generation_commands.run_eval,
            "viz": generation_commands.viz,
        }[options.command](options)
    if options.command in ("bench", "eval", "viz") and options.model == LVLM:
        from tokenprune.evals import lvlm_commands

        return (lvlm_commands.run_eval if options.command == "eval" else lvlm_commands.refuse)(options)
    if options.command == "train" and options.method is not None:
        from tokenprune.training import command

        return command.run(options)
    run: dict[str, Callable[[argparse.Namespace], int]] = {
        "demo": demo.run,
        "methods": commands.methods,
        "bench": commands.run_bench,
        "eval": commands.run_eval,
        "viz": commands.viz,
        "patterns": run_patterns,
        "search": search_command.run_search,
        "train": commands.train,
    }
    return run[options.command](options)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n  " + "\n  ".join(EXAMPLES[name]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_model(command: argparse.ArgumentParser, required: bool = True) -> None:
    command.add_argument(
        "--model",
        required=required,
        help="digits-vit, digits-swin, dinov2-small-wheel, dit-digits, unet-digits, lvlm-digits, a timm name,"
        " owner/name on the Hugging Face hub or module:function",
    )
    command.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights, safetensors only; of dit-digits, unet-digits, lvlm-digits the folder of tokenprune train",
    )
    command.add_argument("--random-weights", action="store_true", help="download none: enough for speed")


def _add_methods(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", action="append", metavar="NAME", help="repeatable (default: all that fit)")
    budgets = command.add_argument_group("budgets, each repeatable (default: --flops 0.6; lvlm-digits: --keep 0.25)")
    budgets.add_argument("--flops", type=float, action="append", metavar="SHARE", help="of the multiply-adds")
    budgets.add_argument("--keep", type=float, action="append", metavar="SHARE", help="of the patch tokens at the end")
    budgets.add_argument("--tokens", type=int, action="append", metavar="N", help="patch tokens at the end")


def _add_generation(command: argparse.ArgumentParser) -> None:
    options = command.add_argument_group("only for dit-digits and unet-digits")
    options.add_argument("--steps", type=_positive, help="denoising steps (default: 20)")
    options.add_argument("--guidance", type=float, help="classifier-free guidance, 1 for none (default: 3)")


def _add_training(command: argparse.ArgumentParser) -> None:
    options = command.add_argument_group("what a method learns (the model itself stays as it is without --model-rate)")
    options.add_argument("--method", metavar="NAME", help="one that learns, see tokenprune methods")
    options.add_argument("--flops", type=float, metavar="SHARE", help="of the multiply-adds, of the mean image")
    _add_data(options, "labelled images to train on (default: the model's own)")
    options.add_argument("--samples", type=_positive, help="of the model's own images (default: 6400)")
    options.add_argument("--checkpoint", metavar="FILE", help="weights of the model, safetensors only")
    options.add_argument("--random-weights", action="store_true", help="download none: to try the command out")
    options.add_argument("--epochs", type=_positive, help="(default: the paper's)")
    options.add_argument("--batch-size", type=_positive, help="of a process at a time (default: the paper's)")
    options.add_argument("--accumulate", type=_positive, default=1, help="batches of a step (default: %(default)s)")
    options.add_argument("--learning-rate", type=float, default=1.0, help="times the paper's (default: %(default)s)")
    options.add_argument(
        "--distill-logits", type=float, metavar="WEIGHT", help="of the unpatched model's classes in the loss"
    )
    options.add_argument("--distill-tokens", type=float, metavar="WEIGHT", help="of its tokens (defaults: the paper's)")
    options.add_argument(
        "--model-rate", type=float, metavar="RATE", help="learning rate of the model's own weights (default: 0, frozen)"
    )
    options.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the method, as JSON; repeatable"
    )
    options.add_argument("--opt", metavar="NAME", help="optimiser of timm (default: the paper's)")
    options.add_argument("--sched", metavar="NAME", help="schedule of timm (default: the paper's)")
    options.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], help="(default: as accelerate is set up)")
    options.add_argument("--save-every", type=_positive, default=100, help="steps (default: %(default)s)")
    options.add_argument("--workers", type=int, default=0, help="processes that read images (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of the images' order (default: %(default)s)")
    options.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_data(command: argparse._ActionsContainer, what: str) -> None:
    command.add_argument(
        "--data",
        help=f"{what}: a folder of images or of class folders, a Hugging Face data set, or openclipart[:FOLDER]",
    )
    command.add_argument("--split", help="of a Hugging Face data set (default: validation, else test)")


def _add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="(default: %(default)s)")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    command.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own)")
    command.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_format(command: argparse.ArgumentParser) -> None:
    formats = command.add_mutually_exclusive_group()
    for name in ("json", "csv", "markdown"):
        formats.add_argument(f"--{name}", action="store_const", const=name, dest="format", help=f"print {name}")
    command.add_argument("--output", metavar="FILE", help="also write the table there: .json, .csv, .md or .txt")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
