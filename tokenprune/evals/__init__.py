"""Measuring what pruning gives and what it costs: speed, FLOPs, accuracy, fidelity, and pictures of the kept tokens."""

from tokenprune.evals.accuracy import evaluate
from tokenprune.evals.bench import bench
from tokenprune.evals.table import Table

__all__ = ["Table", "bench", "evaluate"]
