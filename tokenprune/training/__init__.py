"""Training of what methods learn: one trainer for all of them, on Hugging Face accelerate."""

from tokenprune.training.trainer import train

__all__ = ["train"]
