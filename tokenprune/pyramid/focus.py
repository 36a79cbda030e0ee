"""Where the text of a prompt looks, by the attention of a layer of the language model.

A focus is anything that is called with a `Seen` and returns an importance [n] of its tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModel
from tokenprune.kernels.class_attention import class_attention
from tokenprune.lvlm.host import LayerFacts, LvlmHost
from tokenprune.pyramid.levels import Level, Tile


@dataclass(frozen=True)
class Seen:
    """What a focus is shown of a level.

    embeds: [1, L, C] of the prompt: text, the tokens of the whole image in small, those of the level's tiles with
    separators, text. small: [t] places of the small image's tokens among the L; places: [n] of the level's. tokens:
    (row, column) of these, row by row, in a grid x grid for each tile of the level. size: (width, height) of the image.
    host: the model.
    """

    host: LvlmHost
    embeds: Tensor
    small: Tensor
    places: Tensor
    tokens: Sequence[Tile]
    grid: int
    level: Level
    size: tuple[int, int]


Focus = Callable[[Seen], Tensor]


@dataclass(frozen=True)
class FirstLayers:
    """Training-free: the attention that the last token of the prompt pays the level's tokens in an early layer of the
    language model, softmax over these, mean over heads. Only the layers before it are run.

    layer: which (the one before a quarter of the depth). rotary: with rotary embedding, which favours the tokens
    nearest to the text (Endo et al., FEATHER, ICCV 2025).
    """

    layer: int | None = None
    rotary: bool = False

    def __call__(self, seen: Seen) -> Tensor:
        """Importance [n]."""
        host = seen.host
        index = max(1, len(host.layers) // 4) - 1 if self.layer is None else range(len(host.layers))[self.layer]
        layer, facts = host.layers[index], facts_of(host, index)
        (given,) = inputs_of(host.text, [layer], seen.embeds)
        return attention_row(facts, layer, given, seen.places, rotary=self.rotary).mean(0)


def facts_of(host: LvlmHost, index: int) -> LayerFacts:
    """The facts of a layer."""
    assert host.layer is not None
    return host.layer(index)


Given = tuple[Tensor, tuple[Tensor, Tensor]]


class _EnoughError(Exception):
    """The layers that were asked for have been reached."""


def inputs_of(text: nn.Module, layers: Sequence[nn.Module], embeds: Tensor) -> list[Given]:
    """The input [1, L, C] and the rotary tables of layers of a language model, in the order in which it runs them; what
    is behind the last of them is not run.

    Raises:
        UnsupportedModel: they were not called.
    """
    found: dict[nn.Module, Given] = {}
    thread = threading.get_ident()

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != thread:
            return
        found[layer] = (args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"])
        if layer is layers[-1]:
            raise _EnoughError

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        text(inputs_embeds=embeds, use_cache=False)
    except _EnoughError:
        return [found[layer] for layer in layers]
    finally:
        for handle in handles:
            handle.remove()
    raise UnsupportedModel(
        f"the layers of {type(text).__name__} were not called one by one; a compiled one is not seen"
    )


def attention_row(facts: LayerFacts, layer: nn.Module, given: Given, keys: Tensor, *, rotary: bool) -> Tensor:
    """[H, n] attention that the last token pays the tokens `keys` [n], softmax over these."""
    x, table = given  # of a model on several devices, each part may come from another one
    last, keys = torch.tensor([x.shape[1] - 1], device=x.device), keys.to(x.device)
    rows = [tuple(part.to(x.device)[:, places] for part in table) if rotary else None for places in (last, keys)]
    queries = facts.queries(layer, x[:, last], rows[0])
    return class_attention(queries, facts.keys(layer, x[:, keys], rows[1]), scale=facts.scale)[0]
