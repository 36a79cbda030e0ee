"""The region focus module: a few of the language model's own layers, which learn to look where the whole of it does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokenprune.errors import MALFORMED, TokenPruneError, UnsupportedModel
from tokenprune.ghost import ghost
from tokenprune.lvlm.host import LvlmHost
from tokenprune.pyramid.focus import Seen, attention_row, facts_of, inputs_of
from tokenprune.pyramid.prompt import host_of

_VERSION = 1
_PAPERS, _PAPERS_DEPTH = (1, 5, 11, 14), 28


class FocusModule(nn.Module):
    """Layers copied from a language model, run on a prompt one behind the other; the attention that the last token pays
    the level's tokens in the last of them, as that layer attends, is their importance (mean over heads).

    model: a vision-language model. layers: of it that are copied (1, 5, 11 and 14 of Qwen2's 28 in the paper, in
    proportion by default). It keeps nothing of the model, and belongs to one whose layers have the same shapes.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        host = host_of(model)[0]
        depth = len(host.layers)
        if layers is None:
            layers = sorted({layer * depth // _PAPERS_DEPTH for layer in _PAPERS})
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
            raise UnsupportedModel(f"layers={list(layers)!r} are to be rising, of 0 to {depth - 1}")
        self.picked = tuple(int(layer) for layer in layers)
        self.layers = nn.ModuleList(_copied(host.layers[layer]) for layer in self.picked)

    def forward(self, seen: Seen) -> Tensor:
        """Importance [n] of the level's tokens."""
        return self.rows(seen, seen.places)[-1].mean(0)

    def rows(self, seen: Seen, keys: Tensor) -> list[Tensor]:
        """[H, n] attention of the last token to the tokens `keys` in the first and in the last layer."""
        stack: Any = ghost(seen.host.text)
        stack.layers = self.layers
        return rows_of(seen.host, stack, self.ends([*self.layers]), self.ends(self.picked), seen.embeds, keys)

    @staticmethod
    def ends(parts: Sequence[Any]) -> list[Any]:
        """The first and the last of several, or the only one."""
        return [parts[0], parts[-1]] if len(parts) > 1 else [parts[0]]

    def save(self, path: str | Path) -> None:
        """Write the layers to a safetensors file."""
        from safetensors.torch import save_file

        recipe = {"version": _VERSION, "layers": list(self.picked)}
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, path, {"tokenprune": json.dumps(recipe)})

    @classmethod
    def load(cls, model: nn.Module, path: str | Path) -> FocusModule:
        """The module that was saved, for a model of the same shape.

        Raises:
            TokenPruneError: the file is none of ours, or of another version or model.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        try:
            with safe_open(path, "pt") as file:
                recipe = json.loads((file.metadata() or {}).get("tokenprune", "{}"))
            version, layers = recipe["version"], recipe["layers"]
        except SafetensorError as error:
            raise TokenPruneError(f"{path} is no safetensors file ({error}); FocusModule.save writes one") from None
        except MALFORMED:
            version, layers = None, []
        if version != _VERSION:
            raise TokenPruneError(f"{path} holds no focus module of version {_VERSION}; FocusModule.save writes one")
        module = cls(model, layers)
        try:
            module.load_state_dict(load_file(path))
        except RuntimeError as error:
            raise TokenPruneError(f"{path} belongs to another model: {error}") from None
        return module


def rows_of(
    host: LvlmHost, text: nn.Module, layers: Sequence[nn.Module], numbers: Sequence[int], embeds: Tensor, keys: Tensor
) -> list[Tensor]:
    """[H, n] attention of the last token to `keys` in each of these layers of `text`, as they attend. numbers: of the
    host's layers that they are, or are copies of."""
    given = inputs_of(text, layers, embeds)
    return [
        attention_row(facts_of(host, number), layer, one, keys, rotary=True)
        for number, layer, one in zip(numbers, layers, given, strict=True)
    ]


def _copied(layer: nn.Module) -> nn.Module:
    """A layer with parameters of its own and nobody's hooks."""
    copy = ghost(layer)
    for module in copy.modules():
        for name, tensor in module._parameters.items():
            module._parameters[name] = None if tensor is None else nn.Parameter(tensor.clone())
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    return copy
