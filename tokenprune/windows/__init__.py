"""Models whose attention stays in windows: whole windows are computed or passed through.

A block gathers the chosen windows, runs its attention and MLP on them alone and puts them back among the others, which
keep every bit. So a dense map is there behind each block, whatever comes next.
"""
