"""Taps: what a block's own projections put out while it runs, and the record that a method scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.host import BlockHost, RopeTable
from tokenprune.state import TokenState, flow

if TYPE_CHECKING:
    from tokenprune.patch import Patch


class Taps:
    """The taps of block `index` of a patched model; their hooks are bound methods, as those of a `Site` are."""

    def __init__(self, patch: Patch, index: int, facts: BlockHost) -> None:
        self.patch = patch
        self.index = index
        self.read = facts.read
        self.values = facts.values
        self.rotate = facts.rotate
        self.scale = facts.scale
        self.paths: list[tuple[str, bool, tuple[str, ...]]] = []

    def attach(self, facts: BlockHost) -> None:
        """Put the hooks on the projections whose output the method needs."""
        names = {id(module): name for name, module in facts.module.named_modules()}
        needed = "values" in self.patch.method.needs
        self.paths = [
            (f"catch_{kind}", kind.endswith("inputs"), tuple(filter(None, names[id(module)].split("."))))
            for kind, module in facts.taps
            if needed or kind not in ("values", "value_inputs")
        ]
        self.follow(facts.module)

    def follow(self, block: nn.Module) -> None:
        """Put the hooks on what has come in the place of a projection since: adapters that were added or merged."""
        for name, before, path in self.paths:
            module, hook = block, getattr(self, name)
            for part in path:
                module = getattr(module, part)
            if hook not in (module._forward_pre_hooks if before else module._forward_hooks).values():
                if before:
                    module.register_forward_pre_hook(hook)
                else:
                    module.register_forward_hook(hook)

    def catch_queries(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep the queries of this block until it ends."""
        flow().queries = output

    def catch_keys(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep the keys of this block until it ends."""
        flow().keys = output

    def catch_values(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep what holds the values of this block until it ends."""
        flow().values = (module, output)

    def catch_value_inputs(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the attention's input, where values are recomputed from it."""
        flow().values = (module, args[0])

    def catch_inputs(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the attention's input, where queries and keys are recomputed from it."""
        flow().inputs = (module, args[0])

    def captured(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Queries, keys and values [B, H, N, D] of this block, those that were caught."""
        now = flow()
        queries, keys = self.read(now.queries, now.keys, now.inputs)
        values = self.values(*now.values) if self.values is not None and now.values is not None else None
        return queries, keys, values

    def record(self, x: Tensor, state: TokenState, captured: Any = None) -> AttentionRecord:
        """What a method may look at of x [B, P + n, C]. captured: queries, keys and values where they are known. In a
        training forward the hidden states have their gradient."""
        now = flow()
        queries, keys, values = self.captured() if captured is None else captured
        rotate: Callable[[Tensor], Tensor] | None = None
        if now.rope is not None and self.rotate is not None:
            rotate = partial(_rotated, self.rotate, now.rope)
        return AttentionRecord(
            hidden=x if self.patch.lesson is not None else x.detach(),
            origin=state.origins(x),
            num_prefix_tokens=self.patch.num_prefix_tokens,
            place=self.index,
            depth=self.patch.depth,
            first=self.patch.first,
            grid=state.grid,
            has_class_token=self.patch.has_class_token,
            scale=self.scale,
            queries=queries.detach() if queries is not None else None,
            keys=keys.detach() if keys is not None else None,
            values=values.detach() if values is not None else None,
            sizes=None if state.sizes is None else state.sizes[:, self.patch.num_prefix_tokens :],
            bias=now.bias.detach() if now.bias is not None else None,
            rotate=rotate,
            before=now.before.detach() if now.before is not None else None,
            alive=state.alive.detach() if state.alive is not None else None,
            learned=self.patch.learned_part(self.index, x.device),
        )


def _rotated(rotate: Callable[[Tensor, Any], Tensor], table: RopeTable, x: Tensor) -> Tensor:
    return rotate(x, table)
