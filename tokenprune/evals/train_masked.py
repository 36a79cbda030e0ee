"""``python -m tokenprune.evals.train_masked --masked-steps 1200 --whole-steps 1450 --output FOLDER`` trains the small
DiT with most of its patches dropped, and then on all of them.

The recipe is that of `tokenprune.evals.train_diffusion` with fewer steps: small canvases, on which nothing is dropped,
then whole ones, of which the first `masked_steps` run under `deferred_masking`. With no masked steps it is the training
that this one is measured against. Which patches are dropped at a step depends on the step alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import tokenprune
from tokenprune.evals.digits_denoisers import CHECKPOINTS, DIT
from tokenprune.evals.resumable import run, ship
from tokenprune.evals.train_diffusion import DATA, RECIPES, SAVE_EVERY, SEED, VALIDATE_EVERY, Recipe, Training
from tokenprune.evals.train_diffusion import recipe_record as unmasked_record

RATE = 0.25


class MaskedTraining(Training):
    """A training of the DiT, of whose steps on whole canvases the first `masked_steps` keep `rate` of the patches."""

    def __init__(self, recipe: Recipe, masked_steps: int, rate: float = RATE) -> None:
        super().__init__(DIT, recipe)
        self.masked = range(recipe.small_steps, recipe.small_steps + masked_steps)
        self.rate = rate

    def advance(self) -> None:
        """See `Training`."""
        if self.step in self.masked and not self.model.training:
            tokenprune.patch(self.model, "deferred_masking", rate=self.rate)
            in_training(self.model)
        elif self.step not in self.masked and self.model.training:
            tokenprune.unpatch(self.model).eval()
        torch.manual_seed(SEED + self.step)  # what is drawn of the patches depends on the step alone
        super().advance()


def in_training(model: Any) -> Any:
    """The DiT in training mode, but for its label embeddings, which would drop labels as the recipe does already."""
    model.train()
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.eval()
    return model


def train(output: Path, recipe: Recipe, masked_steps: int) -> dict[str, Any]:
    """Trains the DiT, or goes on where a training in `output` stopped; writes the averaged weights (fp16) and their
    record to `output` and returns the record."""
    training = MaskedTraining(recipe, masked_steps)
    run(training, output, recipe.steps, show_every=VALIDATE_EVERY, save_every=SAVE_EVERY)
    masked = {"method": "deferred_masking", "rate": RATE, "steps": masked_steps}
    record = {"recipe": {**unmasked_record(recipe), "masked": masked}, "data": DATA}
    return ship(training, output / CHECKPOINTS[DIT], record)


def main(arguments: list[str] | None = None) -> None:
    """The command; ``arguments`` replaces the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenprune.evals.train_masked",
        description="Train the small DiT with patches dropped, and then on all of them.",
    )
    parser.add_argument("--small-steps", type=int, default=1500, help="on small canvases (default: %(default)s)")
    parser.add_argument("--whole-steps", type=int, default=700, help="on whole ones (default: %(default)s)")
    parser.add_argument("--masked-steps", type=int, default=0, help="of those, the first (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder; a training that stopped in it goes on")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = Recipe(options.small_steps, options.whole_steps, RECIPES[DIT].peak_lr)
    record = train(options.output, recipe, options.masked_steps)
    print(f"{record['training_cpu_seconds']} s of CPU time, written to {options.output}")


if __name__ == "__main__":
    main()
