"""Compute fewer tokens in a pretrained vision transformer: one line to switch on, one line to switch off."""

# The subpackage first: loaded later, it would take the place of the verb of the same name.
import tokenprune.methods  # noqa: F401  # isort: skip
from tokenprune.api import methods, patch, patched, record, report, unpatch
from tokenprune.errors import BudgetError, SlowdownError, TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.evals.search import search
from tokenprune.pyramid.answer import coarse_to_fine
from tokenprune.registry import register_adapter, register_method

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "SlowdownError",
    "TokenPruneError",
    "UnsupportedMethod",
    "UnsupportedModel",
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
