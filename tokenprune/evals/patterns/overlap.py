"""How much two kept sets have in common (Haurum et al., "Which Tokens to Use?", 2023, sections 4.2 and 4.3)."""

from __future__ import annotations

from torch import Tensor


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of the kept sets `first` and `second` [..., N], bool: [...], 1 for two empty sets."""
    return _share(first & second, first | second)


def ioa(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over area, the share of `second` that is in `first`: [..., N], bool, to [...].

    1 wherever `second` is a subset, the empty set included. The paper has as `second` the set of the smaller budget:
    whether a method at that budget keeps some of what it keeps at the larger one.
    """
    return _share(first & second, second)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    part, whole = part.sum(-1).double(), whole.sum(-1).double()
    return (part / whole.clamp(min=1)).where(whole > 0, 1.0)
