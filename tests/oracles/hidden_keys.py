"""A forward on all tokens in which some are seen by nobody: what is computed of the others is what it would be if those
were not there at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@contextmanager
def hidden(seen: Tensor, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """In every fused attention over as many keys as seen [B, T] has, while `when()`, keys that are not seen get no
    weight."""
    attend = functional.scaled_dot_product_attention

    def masked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if k.shape[-2] == seen.shape[1] and when():
            gone = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, float("-inf"))[:, None, None]
            attn_mask = gone if attn_mask is None else attn_mask + gone
        return attend(q, k, v, attn_mask=attn_mask, **kwargs)

    functional.scaled_dot_product_attention = masked
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attend
