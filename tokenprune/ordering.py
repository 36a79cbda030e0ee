"""Sorting with ties by position."""

from __future__ import annotations

import torch
from torch import Tensor


def order_of(values: Tensor, *, descending: bool = False) -> Tensor:
    """Positions [B, n] of values [B, n] by rising or falling value, ties by rising position."""
    if torch.onnx.is_in_onnx_export():  # it has no other sort than TopK, which breaks ties so, and takes no small types
        wide = values.dtype if values.dtype.itemsize >= 4 else torch.promote_types(values.dtype, torch.int32)
        return values.to(wide).sort(dim=1, descending=descending).indices
    return values.sort(dim=1, descending=descending, stable=True).indices
