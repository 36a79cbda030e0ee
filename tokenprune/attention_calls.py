"""Answering a host's calls of scaled_dot_product_attention, in one thread and for a while."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ATTENTION = torch._C._nn.scaled_dot_product_attention


class AttentionCall(NamedTuple):
    """The arguments of torch's scaled_dot_product_attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class AttentionCalls(TorchFunctionMode):
    """While it is on, `attend` answers each call, in this thread alone."""

    def attend(self, call: AttentionCall) -> Tensor:
        """The output [B, H, M, D] of the call."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not ATTENTION:
            return func(*args, **(kwargs or {}))
        return self.attend(AttentionCall(*args, **(kwargs or {})))
