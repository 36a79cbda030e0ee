"""Compute fewer tokens in a pretrained vision transformer: one line to switch on, one line to switch off."""

from typing import TYPE_CHECKING, Any

# The subpackage first: loaded later, it would take the place of the verb of the same name.
import tokenprune.methods  # noqa: F401  # isort: skip
from tokenprune.api import methods, patch, patched, record, report, unpatch
from tokenprune.calibration import calibrate
from tokenprune.errors import BudgetError, SlowdownError, TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.pyramid.answer import coarse_to_fine
from tokenprune.registry import register_adapter, register_method

if TYPE_CHECKING:
    from tokenprune.evals.search import search

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "SlowdownError",
    "TokenPruneError",
    "UnsupportedMethod",
    "UnsupportedModel",
    "calibrate",
    "coarse_to_fine",
    "methods",
    "patch",
    "patched",
    "record",
    "register_adapter",
    "register_method",
    "report",
    "search",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """`search`, imported when it is asked for: what it measures with is more than patching needs."""
    if name == "search":
        from tokenprune.evals.search import search

        return search
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
