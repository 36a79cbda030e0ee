import json
from importlib import resources

import pytest
import torch
from safetensors.torch import load

from tokenprune.evals import digits_denoisers as denoisers
from tokenprune.evals import train_diffusion

CHECKPOINTS = resources.files("tokenprune.evals") / "checkpoints"
NAMES = tuple(denoisers.CHECKPOINTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_is_small_and_its_record_is_that_of_the_committed_recipe(name):
    stored = (CHECKPOINTS / denoisers.CHECKPOINTS[name]).read_bytes()
    assert len(stored) <= 4_000_000
    assert {value.dtype for value in load(stored).values()} == {torch.float16}
    record = json.loads((CHECKPOINTS / denoisers.CHECKPOINTS[name]).with_suffix(".json").read_text())
    assert record["recipe"] == train_diffusion.recipe_record(train_diffusion.RECIPES[name])
    assert record["data"]["licence"] == "CC BY 4.0"
    assert record["training_cpu_seconds"] <= 90 * 60
    assert record["log"][-1]["step"] == train_diffusion.RECIPES[name].steps
