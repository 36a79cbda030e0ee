"""tokenprune: compute fewer tokens in a pretrained vision transformer, one line to switch on, one line to switch off."""

from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel

__version__ = "0.1.0"

__all__ = ["BudgetError", "TokenPruneError", "UnsupportedMethod", "UnsupportedModel"]
