"""Which method `patch` takes where none is named."""

from __future__ import annotations

from tokenprune.budget import Budget


def default_methods(family: str, budget: Budget) -> tuple[str, ...]:
    """Methods for a family and budget, the best of the evals first; a model that cannot run one gets the next."""
    if family.startswith("diffusers"):
        return ("at_edm",)
    if family in ("timm_swin", "timm_sam", "timm_hiera"):
        return ("sparsevit",)
    if family == "hf_lvlm":
        return ("top_k", "uniform")
    return ("tome", "zero_tprune", "top_k")
