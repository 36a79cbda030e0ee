"""The weights of the small diffusion models: those that the package ships, or those of a training."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from torch import nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.digits_denoisers import CHECKPOINTS, untrained
from tokenprune.evals.models import load_weights

SHIPPED = resources.files("tokenprune.evals") / "checkpoints"


def trained(name: str, folders: Sequence[str | Path] = ()) -> nn.Module:
    """The denoiser called `name`, fp32, in eval mode, with the weights in the first of `folders` that has them; where
    none is named, those that the package ships.

    folders: where `tokenprune train` wrote its checkpoint. Raises TokenPruneError for a name that is not known, for
    weights that are nowhere and for weights of another model.
    """
    # Stored in half precision to stay small; copying into the model's parameters makes it fp32 again.
    model, file = untrained(name), CHECKPOINTS[name]
    if not folders:
        shipped = SHIPPED / file
        if not shipped.is_file():
            raise TokenPruneError(
                f"{name} comes without weights: train it, tokenprune train {name} --output FOLDER, and name the folder,"
                " --checkpoint FOLDER"
            )
        with resources.as_file(shipped) as path:
            load_weights(model, path)
        return model
    found = [Path(folder) / file for folder in folders if (Path(folder) / file).is_file()]
    if not found:
        raise TokenPruneError(
            f"no {file} in {', '.join(map(str, folders))}: tokenprune train {name} --output FOLDER writes it when it is"
            " through, and goes on where it was stopped"
        )
    load_weights(model, found[0])
    return model
