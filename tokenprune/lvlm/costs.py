"""What a prefill costs as a function of the tokens in each layer, counted on the model's own modules.

A layer of the language model costs a polynomial of degree two in its tokens, so three counts on the meta device give
the whole function. The tower and the projector are counted at the images at hand, and scoring and selecting as they
run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.costs import Curve, probe_sizes
from tokenprune.flop_count import MathAttention
from tokenprune.ghost import ghost
from tokenprune.kernels.class_attention import class_attention
from tokenprune.lvlm.host import LvlmHost

Example = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class TextCosts:
    """Multiply-adds of the language model for one prompt. layers: of each, by its tokens; rest: of what is outside of
    the layers, by the prompt's; head: of the logits of one token; score: of a layer's scoring, by the keys."""

    layers: tuple[Curve, ...]
    rest: Curve
    head: int
    score: Curve

    def total(self, tokens: int, left: Mapping[int, int] | None = None, scored: Sequence[int] = ()) -> float:
        """Of a prompt of `tokens`. left: {layer: tokens in it and those behind, until the next}; scored: keys that are
        looked at, at each stage."""
        cost, here = self.rest(tokens) + self.head, tokens
        for index, layer in enumerate(self.layers):
            here = (left or {}).get(index, here)
            cost += layer(here)
        return cost + sum(self.score(keys) for keys in scored)


@dataclass
class Spent:
    """Multiply-adds that were counted. inputs: {shapes: what was given to the tower, to count it}."""

    text: TextCosts | None = None
    encoder: dict[Any, int] = field(default_factory=dict)
    choice: dict[Any, int] = field(default_factory=dict)

    def choosing(self, key: Any, choose: Callable[[], Any]) -> Any:
        """`choose()`, counted the first time that there is this key."""
        if key in self.choice:
            return choose()
        with FlopCounterMode(display=False) as counter:
            result = choose()
        self.choice[key] = int(counter.get_total_flops()) // 2
        return result


@dataclass(frozen=True)
class Given:
    """Arguments of a module's call with the pixels on the meta device; shapes tell one from another."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What the cost depends on."""
        tensors = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        return tuple((tuple(t.shape), tuple(t.flatten().tolist()) if t.dtype == torch.long else None) for t in tensors)


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Given:
    """What is to be remembered of a call."""

    def small(x: Any) -> Any:
        return x.detach().to("meta") if isinstance(x, Tensor) and x.is_floating_point() else x

    return Given(tree_map(small, args), tree_map(small, dict(kwargs)))


def count_call(module: nn.Module, call: Given) -> int:
    """Multiply-adds of module(*args, **kwargs); what reads values of its inputs runs once on zeros."""
    try:
        return _counted(ghost(module, on_meta=True), tree_map(_on_meta, call.args), tree_map(_on_meta, call.kwargs))
    except (NotImplementedError, RuntimeError):
        shadow = ghost(module)
        device = next(shadow.parameters()).device
        if device.type == "meta":  # offloaded weights; numbers do not matter, sizes of grids do
            device = torch.device("cpu")
            for part in shadow.modules():
                _filled(part._parameters, device)
                _filled(part._buffers, device)

        def real(x: Any) -> Any:
            return torch.zeros_like(x, device=device) if isinstance(x, Tensor) and x.is_meta else x

        return _counted(shadow, tree_map(real, call.args), tree_map(real, call.kwargs))


def _filled(own: dict[str, Any], device: torch.device) -> None:
    own.update({name: torch.zeros_like(x, device=device) for name, x in own.items() if x is not None and x.is_meta})


def count_text(host: LvlmHost, example: Example, tokens: int) -> TextCosts:
    """The language model's costs, counted at sizes up to `tokens`."""
    shadow = ghost(host.text, on_meta=True)
    layers: Any = shadow.get_submodule("layers")
    depth = len(layers)
    if len({tuple(p.shape for p in layer.parameters()) for layer in layers}) == 1:  # one stands for all
        shadow.layers = layers = layers[:1]
    runs: list[tuple[int, list[int]]] = []
    for size in probe_sizes(max(tokens, 3)):
        marks: list[int] = []
        with torch.no_grad(), MathAttention(), FlopCounterMode(display=False) as counter:

            def mark(*_: Any, marks: list[int] = marks, counter: FlopCounterMode = counter) -> None:
                marks.append(int(counter.get_total_flops()) // 2)

            hooks = [layer.register_forward_pre_hook(mark) for layer in layers]
            shadow(**example(size))
            mark()
        for hook in hooks:
            hook.remove()
        runs.append((size, marks))
    curves = [
        Curve(tuple((size, marks[index + 1] - marks[index]) for size, marks in runs)) for index in range(len(layers))
    ] * (depth // len(layers))
    rest = Curve(tuple((size, marks[0]) for size, marks in runs))
    head = 0 if host.head is None else _counted(ghost(host.head, on_meta=True), (example(1)["inputs_embeds"],), {})
    return TextCosts(tuple(curves), rest, head, _score_curve(host, layers[0], example))


def _score_curve(host: LvlmHost, layer: nn.Module, example: Example) -> Curve:
    if host.layer is None:
        return Curve(((0, 0),))
    facts, points = host.layer(0), []
    for keys in (1, 2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            query = facts.queries(layer, example(1)["inputs_embeds"], None)
            class_attention(query, facts.keys(layer, example(keys)["inputs_embeds"], None), scale=facts.scale)
        points.append((keys, int(counter.get_total_flops()) // 2))
    return Curve(tuple(points))


def _counted(module: nn.Module, args: Any, kwargs: Any) -> int:
    with torch.no_grad(), MathAttention(), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def _on_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x
