"""One row of attention: what the class token pays every token."""

from tokenprune.kernels.class_attention.eager import class_attention

__all__ = ["class_attention"]
