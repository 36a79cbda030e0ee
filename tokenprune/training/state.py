"""The state of a training: one safetensors file with JSON in its header, from which a killed one goes on exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import MALFORMED, TokenPruneError
from tokenprune.learned_parts import require_safetensors, safetensors, write_whole

FILE = "state.safetensors"
MODEL = "model.safetensors"
VERSION = 1


def write_state(path: Path, state: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Write `state`, nested dicts and lists of tensors and numbers, in one piece. recipe: what may not differ in the
    training that goes on from it."""
    tensors: dict[str, Tensor] = {}
    data = {"version": VERSION, "recipe": dict(recipe), "state": _packed(state, tensors, "")}
    write_whole(path, safetensors().torch.save(tensors, {"state": json.dumps(data, allow_nan=False)}))


def read_state(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `write_state`.

    Raises:
        TokenPruneError: it is no such file, cut off, or of a training with another recipe.
    """
    require_safetensors(path)
    with safetensors().safe_open(path, framework="pt") as file:
        try:
            data = json.loads((file.metadata() or {})["state"])
            version, theirs = data["version"], data["recipe"]
        except MALFORMED as error:
            raise TokenPruneError(f"{path} is no state that tokenprune train has written: {error!r}") from error
        if version != VERSION:
            raise TokenPruneError(f"{path} has version {version!r}; this release reads version {VERSION}")
        own = json.loads(json.dumps(dict(recipe)))
        differs = [key for key in {**theirs, **own} if theirs.get(key) != own.get(key)]
        if differs:
            told = ", ".join(f"{key} {theirs.get(key)!r} and not {own.get(key)!r}" for key in differs)
            raise TokenPruneError(
                f"{path} is of a training with {told}; go on with the same, or name an --output of its own"
            )
        state: dict[str, Any] = _unpacked(data["state"], file.get_tensor)
        return state


def _packed(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` as JSON, its tensors moved to `tensors`. Keys may be numbers, which JSON has not."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _packed(one, tensors, f"{name}.{key}")] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        packed = [_packed(one, tensors, f"{name}.{index}") for index, one in enumerate(value)]
        return {"tuple": packed} if isinstance(value, tuple) else packed
    return value


def _unpacked(value: Any, tensor: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(one, tensor) for one in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensor(value["tensor"])
    if "tuple" in value:
        return tuple(_unpacked(one, tensor) for one in value["tuple"])
    return {key: _unpacked(one, tensor) for key, one in value["items"]}


def generators() -> list[Tensor]:
    """The states of torch's generators that a forward may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def set_generators(states: list[Tensor]) -> None:
    """The inverse of `generators`. Without CUDA, the state of its generator is passed over: what is drawn comes from
    the CPU's, whose state there is too. With CUDA and no state of it, its generator stays as it is."""
    states = [one.clone() for one in states]  # of a row of a tensor, torch reads what lies beside it
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])
