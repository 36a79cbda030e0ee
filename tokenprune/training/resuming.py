"""Whether a state is that of a training that goes on: of its images, labels and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.data import ImageData
from tokenprune.training.identity import SAME, of_weights, other_data, same_weights
from tokenprune.training.state import MODEL
from tokenprune.training.taught import Taught

if TYPE_CHECKING:
    from tokenprune.training.work import Work

_STOPPED: WeakKeyDictionary[nn.Module, tuple[Path, Tensor]] = WeakKeyDictionary()
"""Of models that are trained and whose training has been stopped, its state and `of_weights` of what they then were."""


@contextmanager
def remembered(model: nn.Module | None, state: Path | None) -> Iterator[None]:
    """How far a model that is trained has come where training stops, for who goes on with it in this process."""
    try:
        yield
    except BaseException:
        if model is not None and state is not None:
            _STOPPED[model] = (state.resolve(), of_weights(model.state_dict().values()))
        raise


def check_state(work: Work, path: Path, state: Mapping[str, Any], data: ImageData, workers: int) -> dict[str, Any]:
    """The identity that `work` has once it goes on from the `state` read at `path`, of which nothing is taken yet.

    Raises:
        TokenPruneError: the state is of other data or weights.
    """
    otherwise = "go on with the same, or name an --output of its own"
    for module, stored in ((work.learned, state["learned"]), (work.model, state["model"])):
        if module is not None and _shapes(module.state_dict()) != _shapes(stored):
            raise TokenPruneError(f"{path} is of a model of other shapes; {otherwise}")
    theirs: dict[str, Any] | None = state.get("identity")
    # Whether there are weights, frozen or of a teacher, that the state does not hold.
    outside = work.model is None or (isinstance(work.inner, Taught) and work.inner.teacher is not None)
    if theirs is None:  # of a release that did not write it
        norms, own = (torch.tensor(one, dtype=torch.float64) for one in (state.get("norms", ()), work.start.norms))
        if outside and len(norms) and not torch.allclose(norms, own, rtol=SAME, atol=0):
            raise TokenPruneError(f"{path} is of a model with other weights, which it does not hold; {otherwise}")
        # Where all weights are trained, those that it began with are not known.
        return work.identity if outside else {**work.identity, "weights": None}
    differs = other_data(theirs["data"], work.identity["data"], data, work.recipe["seed"], workers)
    if differs:
        told = " and ".join(f"other {name}" for name in differs)
        raise TokenPruneError(f"{path} is of a training on {told} than those of {data.name!r} are; {otherwise}")
    began, now = theirs["weights"], work.identity["weights"]
    if outside and not same_weights(began, now):
        raise TokenPruneError(f"{path} is of a model with other weights, which it does not hold; {otherwise}")
    if work.model is not None and not outside and began is not None:
        known, stopped = [began, of_weights(state["model"].values())], _STOPPED.get(work.model)
        if stopped is not None and stopped[0] == path.resolve():
            known.append(stopped[1])
        if not any(same_weights(one, now) for one in known):
            raise TokenPruneError(
                f"{path} is of a model with other weights: go on with those that it began with or those in"
                f" {path.parent / MODEL}, which it has reached, or name an --output of its own"
            )
    return theirs


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: one.shape for name, one in tensors.items()}
