"""Row-wise best match by cosine similarity."""

from tokenprune.kernels.matching.eager import cosine_match

__all__ = ["cosine_match"]
