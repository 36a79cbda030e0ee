"""The commands and what each takes."""

from __future__ import annotations

import argparse

from tokenprune.cli.examples import EXAMPLES
from tokenprune.cli.options import (
    add_budgets,
    add_data,
    add_format,
    add_generation,
    add_json,
    add_machine,
    add_methods,
    add_model,
    add_restore,
    add_texts,
    add_training,
    positive,
    seed,
    threads,
    workers,
)

RECIPES = (
    "digits-vit",
    "digits-swin",
    "dit-digits",
    "unet-digits",
    "lvlm-digits",
    "digit-reader",
    "digit-masks",
    "deblur-swin",
)


OF_HUB = "clip:NAME, vlm:NAME (of transformers), pipe:NAME (of diffusers)"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="tokenprune",
        description="Make a pretrained vision transformer compute fewer tokens, and measure what that gives and costs.",
        epilog="tokenprune COMMAND --help has examples for each command. Exit codes: 0 done; 1 it failed, and why"
        " is told in one line on standard error; 2 wrong usage; 130 interrupted.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "every method on the shipped ViT: a table and two pictures, computed now")
    demo.add_argument("--output", default="demo-output", metavar="FOLDER", help="where to write (default: %(default)s)")
    demo.add_argument("--samples", type=positive, default=500, help="test pictures (default: %(default)s)")
    add_machine(demo)
    add_json(demo)

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
    drawn.add_argument("--samples", type=positive, default=30, help="pictures a row (default: %(default)s)")
    add_machine(drawn)
    add_json(drawn)

    methods = _command(commands, "methods", "the methods, or those that fit a model")
    add_model(methods, required=False, also=OF_HUB)
    methods.add_argument(
        "--table",
        action="store_true",
        help="put every method on a tiny model of each family: the table, Markdown or JSON",
    )
    add_format(methods)

    doctor = _command(commands, "doctor", "what is installed here, what works together, which kernels run and why")
    add_machine(doctor)
    add_format(doctor)

    report = _command(commands, "report", "what a patch would do to a model: places, tokens, multiply-adds, and why")
    add_model(report, also=OF_HUB)
    report.add_argument("--method", metavar="NAME", help="(default: chosen by family and budget)")
    add_budgets(report)
    report.add_argument("--schedule", metavar="FILE", help="of tokenprune search, in the place of a budget")
    add_generation(report)
    add_machine(report)
    add_json(report)

    bench = _command(commands, "bench", "speed, FLOPs and memory, patched and unpatched interleaved in one process")
    add_model(bench)
    add_methods(bench)
    bench.add_argument(
        "--batch-size", type=positive, action="append", metavar="N", help="images a forward; repeatable (default: 8)"
    )
    bench.add_argument("--rounds", type=positive, default=20, help="timed rounds, at least 20 (default: %(default)s)")
    bench.add_argument(
        "--profile", action="store_true", help="also what share of the time scoring, selecting and reducing take"
    )
    bench.add_argument(
        "--save-profile",
        action="store_true",
        help="store a latency table for this model, device, dtype and threads, by which patch warns of a slowdown",
    )
    add_generation(bench)
    add_data(bench, "what to time on (default: the model's own images, else noise)")
    add_machine(bench)
    add_format(bench)

    evaluate = _command(
        commands,
        "eval",
        "accuracy and fidelity to the unpatched model; of diffusion models their pictures, of the"
        " vision-language model its answers",
    )
    add_model(evaluate, also=OF_HUB)
    add_methods(evaluate)
    files = "; clip: captions.jsonl, vlm: questions.jsonl, pipe: prompts.txt"
    add_data(evaluate, "what to evaluate on (default: the model's own images)", also=files)
    evaluate.add_argument(
        "--samples", type=positive, help="images, drawn by --seed (default: all; digits: 1000; lvlm-digits: 75)"
    )
    evaluate.add_argument("--batch-size", type=positive, default=32, help="(default: %(default)s)")
    evaluate.add_argument(
        "--workers", type=workers, default=0, help="processes that read images (default: %(default)s)"
    )
    evaluate.add_argument(
        "--rounds", type=positive, help="dit-digits, unet-digits, lvlm-digits: time every row too, at least 20 rounds"
    )
    add_generation(evaluate)
    add_texts(evaluate)
    add_machine(evaluate)
    add_format(evaluate)

    compare = _command(commands, "compare", "models, methods and budgets in one run: tables and a page to read")
    compare.add_argument("--model", action="append", required=True, help="as in tokenprune eval; repeatable")
    compare.add_argument("--random-weights", action="store_true", help="download none: enough for speed")
    add_methods(compare)
    add_data(compare, "what to evaluate on (default: the model's own images)")
    compare.add_argument(
        "--samples", type=positive, help="images, by --seed (default: 500; of diffusion models 100, of lvlm-digits 75)"
    )
    compare.add_argument("--steps", type=positive, help="dit-digits, unet-digits: denoising steps (default: 20)")
    compare.add_argument("--batch-size", type=positive, default=16, help="of all forwards (default: %(default)s)")
    compare.add_argument("--rounds", type=positive, default=20, help="timed, at least 20 (default: %(default)s)")
    compare.add_argument(
        "--image", action="append", metavar="FILE", help="to draw on; repeatable (default: of the data)"
    )
    compare.add_argument(
        "--output", required=True, metavar="FOLDER", help="for page and tables; one that was stopped goes on there"
    )
    add_machine(compare)
    add_json(compare)

    viz = _command(commands, "viz", "which patches survive, drawn over the image, place by place")
    add_model(viz)
    add_methods(viz)
    viz.add_argument("--image", action="append", metavar="FILE", help="repeatable (default: the model's own images)")
    viz.add_argument("--places", type=positive, default=6, help="at most so many a row (default: %(default)s)")
    viz.add_argument("--output", default="kept.png", metavar="FILE", help="(default: %(default)s)")
    add_machine(viz)

    patterns = _command(
        commands, "patterns", "which tokens methods, budgets and models have in common, and whether that tells accuracy"
    )
    add_model(patterns)
    add_methods(patterns)
    add_data(patterns, "what to compare on (default: the model's own images)")
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
    patterns.add_argument("--samples", type=positive, default=300, help="images, by --seed (default: %(default)s)")
    patterns.add_argument("--batch-size", type=positive, default=32, help="(default: %(default)s)")
    patterns.add_argument("--resamples", type=positive, default=1000, help="of the bootstrap (default: %(default)s)")
    patterns.add_argument(
        "--output", required=True, metavar="FOLDER", help="for the tables (.md, .csv, .json) and the plots"
    )
    add_machine(patterns)
    add_json(patterns)

    search = _command(commands, "search", "the schedule of a method that suits a model best, from unlabelled images")
    add_model(search)
    search.add_argument("--method", required=True, metavar="NAME", help="whose schedule, see tokenprune methods")
    goal = search.add_mutually_exclusive_group(required=True)
    goal.add_argument("--flops", type=float, metavar="SHARE", help="of the multiply-adds: the best schedule there")
    goal.add_argument("--speedup", type=float, metavar="TIMES", help="measured here: the best schedule so fast")
    goal.add_argument("--min-agreement", type=float, metavar="SHARE", help="with the unpatched model: the fastest then")
    add_data(search, "what to search on (default: images of the model's own that eval does not take)")
    search.add_argument("--samples", type=positive, default=64, help="images (default: %(default)s)")
    search.add_argument("--batch-size", type=positive, default=8, help="of what is timed (default: %(default)s)")
    search.add_argument("--candidates", type=positive, default=200, help="schedules to try (default: %(default)s)")
    search.add_argument("--strategy", choices=["evolution", "monte_carlo"], default="evolution")
    add_restore(search)
    search.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="for schedule.json and the state, from which a killed search goes on",
    )
    add_machine(search)
    add_json(search)

    calibrate = _command(
        commands, "calibrate", "the threshold at which a method that adapts to each image meets a budget in the mean"
    )
    add_model(calibrate)
    calibrate.add_argument(
        "--method", default="tome", metavar="NAME", help="tome, saint, algm or ltmp (default: %(default)s)"
    )
    calibrate.add_argument(
        "--flops", type=float, required=True, metavar="SHARE", help="of the multiply-adds, of the mean image"
    )
    add_data(calibrate, "unlabelled images (default: images of the model's own that eval does not take)")
    calibrate.add_argument("--samples", type=positive, default=64, help="images (default: %(default)s)")
    calibrate.add_argument("--batch-size", type=positive, default=64, help="(default: %(default)s)")
    add_restore(calibrate)
    calibrate.add_argument("--output", required=True, metavar="FILE", help=".json, which patch(schedule=...) takes")
    add_machine(calibrate)
    add_json(calibrate)

    score = _command(
        commands, "score", "pictures of a diffusion model against real ones, prompts or those of another run"
    )
    score.add_argument("--pictures", required=True, metavar="FOLDER", help="generated, by name in the prompts' order")
    score.add_argument("--real", metavar="FOLDER", help="real pictures: FID, by torch-fidelity")
    score.add_argument("--features", metavar="MODEL", help="of the distance to them, as in eval (default: Inception)")
    score.add_argument("--checkpoint", metavar="FILE", help="weights of MODEL, safetensors only")
    score.add_argument("--reference", metavar="FOLDER", help="pictures of the same names: PSNR, SSIM")
    score.add_argument("--lpips", choices=["alex", "squeeze", "vgg"], help="LPIPS to them as well, by torchmetrics")
    score.add_argument("--inception", metavar="FILE", help="weights of its Inception (default: downloaded)")
    score.add_argument("--prompts", metavar="FILE", help="one line a picture: CLIP score, by transformers")
    score.add_argument("--clip", default="openai/clip-vit-large-patch14", help="name or folder (default: %(default)s)")
    score.add_argument("--device", help="(default: cuda where there is one, else cpu)")
    score.add_argument("--seed", type=seed, default=0, help="of the bootstrap (default: %(default)s)")
    add_format(score)

    train = _command(commands, "train", "what a method learns for a model, or a model of the package by its recipe")
    train.add_argument(
        "model",
        help=f"by its recipe: {', '.join(RECIPES)}; with --method: digits-vit, a timm name, owner/name on the Hugging"
        " Face hub or module:function",
    )
    train.add_argument("--output", required=True, metavar="FOLDER", help="for the checkpoint and its record")
    train.add_argument("--steps", type=positive, help="of a recipe, other than its own only to try the command out")
    train.add_argument("--threads", type=threads, default=1, help="CPU threads (default: %(default)s)")
    add_training(train)
    add_json(train)
    return top


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
