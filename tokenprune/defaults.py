"""Which method `patch` takes where none is named."""

from __future__ import annotations

from tokenprune.budget import Budget


def default_method(family: str, budget: Budget) -> str:
    """The method that the evals show to be best for a family and budget."""
    return "tome"
