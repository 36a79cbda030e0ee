"""Scores: pure functions from an AttentionRecord to the importance [B, n] of its prunable tokens."""
