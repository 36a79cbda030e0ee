"""Denoisers: models called once a step of a run, whose tokens are all back behind each stack of blocks.

host: the facts an adapter gives. steps: the schedule over a run. run: where in its run a forward is. site: the hooks on
a block. costs and plan: from a budget to the tokens computed in each stack at each step. patch: the whole.
"""
