"""Methods for tokens in models whose attention stays in windows, and which need all tokens behind each block.

A block's attention runs as it is. What a method keeps or merges in each window is all that its MLP is run on; behind it
a merged token takes what its group gained, and one that was dropped is as it was in front.
"""
