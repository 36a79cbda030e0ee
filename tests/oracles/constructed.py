"""Places written by hand: small numbers instead of a model."""

from collections.abc import Sequence

import torch
from naive_vit import Matrix, Place, Token


def constructed_place(
    keep: int,
    *,
    attention: Sequence[Matrix] | None = None,
    keys: Sequence[Sequence[float]] | None = None,
    hidden: Sequence[float] | None = None,
    members: Sequence[tuple[int, ...]] | None = None,
    prefix: int = 0,
    class_token: bool = False,
) -> Place:
    """One place; keys (of one head) and one-channel hidden states are given for the patch tokens alone."""
    if attention is not None:
        patches = len(attention[0]) - prefix
    else:
        patches = len(keys if keys is not None else hidden or ())
    hidden = hidden if hidden is not None else [float(j) for j in range(patches)]
    members = members if members is not None else [(j,) for j in range(patches)]
    tokens = [Token(torch.tensor([h], dtype=torch.float64), m, m[0]) for h, m in zip(hidden, members, strict=True)]
    width = len(keys[0]) if keys is not None else 1
    padded = [[0.0] * width] * prefix + list(keys if keys is not None else [[1.0]] * patches)
    return Place(0, tokens, prefix, class_token, attention or [], [padded], keep)


def same_rows(row: Sequence[float]) -> Matrix:
    """The attention of a head whose every query looks at the same keys: any PageRank of it is that row."""
    return [list(row) for _ in row]


def patches(tokens: Sequence[Token]) -> list[tuple[int, ...]]:
    return [token.members for token in tokens]
