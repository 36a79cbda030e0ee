"""tokenprune: compute fewer tokens in a pretrained vision transformer, one line to switch on, one line to switch off."""

from tokenprune.api import methods, patch, patched, record, report, unpatch
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.registry import register_adapter, register_method

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "TokenPruneError",
    "UnsupportedMethod",
    "UnsupportedModel",
    "methods",
    "patch",
    "patched",
    "record",
    "register_adapter",
    "register_method",
    "report",
    "unpatch",
]
