"""Compute fewer tokens in a pretrained vision transformer: one line to switch on, one line to switch off."""

from typing import TYPE_CHECKING, Any

# The subpackage first: loaded later, it would take the place of the verb of the same name.
import tokenprune.methods  # noqa: F401  # isort: skip
from tokenprune.api import learned, methods, patch, patched, record, report, unpatch
from tokenprune.calibration import calibrate
from tokenprune.errors import (
    BudgetError,
    SlowdownError,
    TokenPruneError,
    UnsupportedMethod,
    UnsupportedModel,
    UntrainedMethod,
)
from tokenprune.kept_patches import kept_patches, masked_mse
from tokenprune.pyramid.answer import coarse_to_fine
from tokenprune.registry import register_adapter, register_method

if TYPE_CHECKING:
    from tokenprune.evals.search import search
    from tokenprune.training import train

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "SlowdownError",
    "TokenPruneError",
    "UnsupportedMethod",
    "UnsupportedModel",
    "UntrainedMethod",
    "calibrate",
    "coarse_to_fine",
    "kept_patches",
    "learned",
    "masked_mse",
    "methods",
    "patch",
    "patched",
    "record",
    "register_adapter",
    "register_method",
    "report",
    "search",
    "train",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """`search` and `train`, imported when they are asked for: what they need is more than patching does."""
    if name == "search":
        from tokenprune.evals.search import search

        return search
    if name == "train":
        from tokenprune.training import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
