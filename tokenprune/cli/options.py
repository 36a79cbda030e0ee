"""Options that several commands have."""

from __future__ import annotations

import argparse


def add_model(command: argparse.ArgumentParser, required: bool = True, also: str = "") -> None:
    command.add_argument(
        "--model",
        required=required,
        help="digits-vit, digits-swin, digit-masks, deblur-swin, dinov2-small-wheel, dit-digits, unet-digits,"
        f" lvlm-digits, a timm name, owner/name on the Hugging Face hub or module:function{also and ', '}{also}",
    )
    command.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights, safetensors only; of dit-digits, unet-digits, lvlm-digits the folder of tokenprune train",
    )
    command.add_argument("--random-weights", action="store_true", help="download none: enough for speed")


def add_methods(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", action="append", metavar="NAME", help="repeatable (default: all that fit)")
    add_budgets(command)


def add_budgets(command: argparse.ArgumentParser) -> None:
    budgets = command.add_argument_group("budgets, each repeatable (default: --flops 0.6; lvlm-digits: --keep 0.25)")
    budgets.add_argument("--flops", type=float, action="append", metavar="SHARE", help="of the multiply-adds")
    budgets.add_argument("--keep", type=float, action="append", metavar="SHARE", help="of the patch tokens at the end")
    budgets.add_argument("--tokens", type=int, action="append", metavar="N", help="patch tokens at the end")


def add_generation(command: argparse.ArgumentParser) -> None:
    options = command.add_argument_group("only for dit-digits, unet-digits and pipe:NAME")
    options.add_argument("--steps", type=positive, help="denoising steps (default: 20)")
    options.add_argument("--guidance", type=float, help="classifier-free guidance, 1 for none (default: 3)")


def add_texts(command: argparse.ArgumentParser) -> None:
    options = command.add_argument_group("only for vlm:NAME or pipe:NAME")
    options.add_argument("--max-new-tokens", type=positive, help="vlm: of an answer (default: 32)")
    options.add_argument("--clip", metavar="NAME", help="pipe: a CLIP, for the score of pictures and prompts")
    options.add_argument("--lpips", choices=["alex", "squeeze", "vgg"], help="pipe: LPIPS to the unpatched picture")
    options = command.add_argument_group("only for clip:NAME")
    options.add_argument("--classes", metavar="FILE", help="their names, one a line (default: the data's own)")
    options.add_argument(
        "--template", action="append", help="of a text with {} for the name; repeatable (default: a photo of a {}.)"
    )


def add_training(command: argparse.ArgumentParser) -> None:
    options = command.add_argument_group("what a method learns (the model itself stays as it is without --model-rate)")
    options.add_argument("--method", metavar="NAME", help="one that learns, see tokenprune methods")
    options.add_argument("--flops", type=float, metavar="SHARE", help="of the multiply-adds, of the mean image")
    add_data(options, "labelled images to train on (default: the model's own)")
    options.add_argument("--samples", type=positive, help="of the model's own images (default: 6400)")
    options.add_argument("--checkpoint", metavar="FILE", help="weights of the model, safetensors only")
    options.add_argument("--random-weights", action="store_true", help="download none: to try the command out")
    options.add_argument("--epochs", type=positive, help="(default: the paper's)")
    options.add_argument("--batch-size", type=positive, help="of a process at a time (default: the paper's)")
    options.add_argument("--accumulate", type=positive, default=1, help="batches of a step (default: %(default)s)")
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
    options.add_argument("--save-every", type=positive, default=100, help="steps (default: %(default)s)")
    options.add_argument("--workers", type=workers, default=0, help="processes that read images (default: %(default)s)")
    options.add_argument("--seed", type=seed, default=0, help="of the images' order (default: %(default)s)")
    options.add_argument("--quiet", action="store_true", help="no progress bar")


def add_restore(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--restore",
        choices=["unmerge", "regression", "feature", "place", "fusion"],
        help="what stands for a token that left, where the full grid is read (default: the method's own)",
    )


def add_data(command: argparse._ActionsContainer, what: str, also: str = "") -> None:
    command.add_argument(
        "--data",
        help=f"{what}: a folder of images, of class folders, of webdataset's tars or of a saved data set, the name"
        f" of one on the Hugging Face hub, stream:NAME to read it as it comes, or openclipart[:FOLDER]{also}",
    )
    command.add_argument(
        "--split", help="of a data set (default: validation, else test), or a brace pattern of tars (default: all)"
    )


def add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="(default: %(default)s)")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    command.add_argument("--threads", type=threads, help="CPU threads (default: torch's own)")
    command.add_argument("--seed", type=seed, default=0, help="of everything that is drawn (default: %(default)s)")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def add_format(command: argparse.ArgumentParser) -> None:
    formats = command.add_mutually_exclusive_group()
    for name in ("json", "csv", "markdown"):
        formats.add_argument(f"--{name}", action="store_const", const=name, dest="format", help=f"print {name}")
    command.add_argument("--output", metavar="FILE", help="also write the table there: .json, .csv, .md or .txt")


def add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_const", const="json", dest="format", help="print json")


def positive(text: str) -> int:
    return _within(text, 1, 2**31 - 1)


def threads(text: str) -> int:
    return _within(text, 1, 1024)


def workers(text: str) -> int:
    return _within(text, 0, 1024)


def seed(text: str) -> int:
    return _within(text, 0, 2**32 - 1)  # what every library takes


def _within(text: str, least: int, most: int) -> int:
    value = int(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{value} is not from {least} to {most}")
    return value
