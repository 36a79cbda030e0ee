"""A structural copy of a model that shares its tensors and carries none of the user's hooks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def ghost(module: nn.Module, *, on_meta: bool = False, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """`module` once more, in eval mode: the same parameters and buffers (detached; with `on_meta` only their shapes),
    new module objects, no hooks, no compiled code. Running it calls nothing of the user's, and changing its modules
    changes nothing of the original."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    if on_meta and type(module).__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "in_features"):
        # Its operators know no meta device; it stands for a layer of as many multiply-adds.
        features: Any = module
        return nn.Linear(features.in_features, features.out_features, device="meta")
    copy: nn.Module = module.__class__.__new__(module.__class__)
    memo[id(module)] = copy
    state: dict[str, Any] = dict(module.__dict__)
    for name in _HOOKS:
        if name in state:
            state[name] = OrderedDict()
    for name in ("_parameters", "_buffers"):
        state[name] = {key: None if t is None else _shared(t, on_meta) for key, t in state[name].items()}
    state["_modules"] = {
        key: None if child is None else ghost(child, on_meta=on_meta, memo=memo)
        for key, child in module._modules.items()
    }
    state.pop("_compiled_call_impl", None)
    state.pop("forward", None)  # an instance-level forward (offloading, caches) belongs to the original
    state["training"] = False
    copy.__dict__.update(state)
    return copy


def _shared(tensor: Tensor, on_meta: bool) -> Tensor:
    tensor = tensor.detach()
    if not on_meta:
        return tensor
    if is_traceable_wrapper_subclass(tensor):  # as torchao's: what it computes with costs what a plain one costs
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor.to("meta")
