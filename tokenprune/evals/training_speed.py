"""What dropping tokens in training saves: whole steps (forward, backward, optimiser) beside unpatched ones.

    python -m tokenprune.evals.training_speed

Random weights and images: neither has anything to do with how long a step takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import Arm, measure


@dataclass(frozen=True)
class Case:
    """make: () -> the model in training mode and the loss of a step. batch: images of it."""

    make: Callable[[int], tuple[nn.Module, Callable[[], Tensor]]]
    batch: int
    method: str
    arguments: Mapping[str, Any]


def dit(batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The shipped DiT on pictures of its size, as `tokenprune.evals.train_diffusion` trains it."""
    from tokenprune.evals.digits_denoisers import UNCONDITIONAL
    from tokenprune.evals.digits_denoisers import dit as untrained
    from tokenprune.evals.drawn_digits import IMAGE_SIZE
    from tokenprune.evals.train_masked import in_training

    model = in_training(untrained())
    images, target = torch.randn(2, batch, 3, IMAGE_SIZE, IMAGE_SIZE).unbind(0)
    times, labels = 1000 * torch.rand(batch), torch.randint(UNCONDITIONAL + 1, (batch,))

    def loss() -> Tensor:
        velocity = model(images, timestep=times, class_labels=labels).sample
        return tokenprune.masked_mse(velocity, target, tokenprune.kept_patches(model))

    return model, loss


def vit(batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A ViT-S at 224 pixels."""
    import timm

    return _classifier(timm.create_model("vit_small_patch16_224"), 224, batch)


def digits_vit(batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The shipped ViT."""
    from tokenprune.evals.digits import IMAGE_SIZE
    from tokenprune.evals.digits_vit import digits_vit as untrained

    return _classifier(untrained(pretrained=False), IMAGE_SIZE, batch)


def clip(batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A CLIP of a ViT-S at 224 pixels and texts of 16 tokens, with its contrastive loss."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, "num_hidden_layers": 6, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 999},
            vision_config={**sizes, "num_hidden_layers": 12, "patch_size": 16, "image_size": 224},
        )
    ).train()
    images, texts = torch.randn(batch, 3, 224, 224), torch.randint(2, 999, (batch, 16))

    def loss() -> Tensor:
        found: Tensor = model(pixel_values=images, input_ids=texts, return_loss=True).loss
        return found

    return model, loss


def _classifier(model: nn.Module, side: int, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    images, labels = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
    return model.train(), lambda: nn.functional.cross_entropy(model(images), labels)


CASES: dict[str, Case] = {
    "dit-digits": Case(dit, 32, "deferred_masking", {"keep": 0.25}),
    "dit-digits, two blocks mix": Case(dit, 32, "deferred_masking", {"keep": 0.25, "mixer": 0.34}),
    "digits-vit": Case(digits_vit, 64, "flip", {"keep": 0.5}),
    "ViT-S at 224": Case(vit, 4, "flip", {"keep": 0.5}),
    "ViT-S at 224, noise": Case(vit, 4, "noise_mask", {"keep": 0.25}),
    "CLIP, ViT-S at 224": Case(clip, 4, "flip", {"keep": 0.5}),
}


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Arm:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def speed(name: str, *, rounds: int = 20, attempts: int = 1, clock: Callable[[], float] = time.perf_counter) -> Row:
    """How many times as fast a patched step of one of CASES is, and the promise of its multiply-adds."""
    case, arms = CASES[name], list[Arm]()
    for patched in (False, True, False):
        torch.manual_seed(0)
        model, loss = case.make(case.batch)
        if patched:
            tokenprune.patch(model, case.method, **case.arguments)
            loss()
            report = tokenprune.report(model).to_dict()
        arms.append(_step(model, loss))
    timing = measure(*arms, rounds=rounds, warmup=1, attempts=attempts, clock=clock)
    what = ", ".join(f"{key}={value}" for key, value in case.arguments.items())
    row: Row = {"training": name, "batch": case.batch, "method": case.method, "budget": what}
    row |= {"promise": 1 / report["flops_ratio"], **interval_cells("speedup", timing.speedup)}
    return row | {"seconds": timing.seconds, "control": timing.control, "trusted": timing.trusted}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.training_speed", description=main.__doc__)
    parser.add_argument("--training", action="append", choices=list(CASES), help="repeatable (default: all)")
    parser.add_argument("--rounds", type=int, default=20, help="at least 20 (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=1, help="of a quiet measurement (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, where a machine is busy")
    options = parser.parse_args(arguments)
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    names = options.training or CASES
    rows = [speed(name, rounds=options.rounds, attempts=options.attempts, clock=clock) for name in names]
    print(Table(rows, environment()).to_markdown(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
