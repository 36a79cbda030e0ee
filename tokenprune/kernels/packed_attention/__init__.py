"""Attention over a ragged batch: images of different token numbers, one behind another."""

from tokenprune.kernels.packed_attention.dispatch import BACKENDS, choose_backend, packed_attention

__all__ = ["BACKENDS", "choose_backend", "packed_attention"]
