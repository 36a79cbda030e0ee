"""Reduction patterns: which tokens methods keep, and whether what they share says how much accuracy they lose.

After Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers", ICCV workshops 2023.
"""

from tokenprune.evals.patterns.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
