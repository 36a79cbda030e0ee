"""A second module tree on the same weights, so that a patched and an unpatched model can stand side by side."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from torch import nn


def shared_copy(model: nn.Module) -> nn.Module:
    """A deep copy of `model` whose parameters and buffers are those of `model` itself: no memory for a second set.

    Patching, unpatching or switching the mode of the copy leaves `model` as it is; a weight that is changed in place
    changes in both.
    """
    shared: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)
