"""Selection: pure functions from scores to the Reduction that keeps K of n tokens."""
