"""The site of a method that runs parts of a block on fewer tokens: the self-attention on merged tokens, or its keys and
values alone. Norms, residuals and all other parts see every token.

The choice is made before the block from what enters it; native hooks on the parts apply it, so that processors,
attention backends and adapters in the attention stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.denoisers.here import here
from tokenprune.denoisers.host import Arguments, BlockFacts
from tokenprune.denoisers.records import grid_of
from tokenprune.denoisers.run import Chosen, Pass
from tokenprune.denoisers.site import BlockSite
from tokenprune.denoisers.stacks import FUSED
from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.tables import positions


class PartsSite(BlockSite):
    """A block of which some parts run on fewer tokens."""

    @staticmethod
    def narrowed(facts: BlockFacts, method: Method) -> list[nn.Module]:
        return [facts.parts[part] for part in method.parts if part in facts.parts and part != "keys"]

    def attach(self, facts: BlockFacts) -> None:
        super().attach(facts)
        self.fused = facts.fused
        for part in self.patch.method.parts:
            module = facts.parts.get(part)
            if module is None:  # it has none, or the stack is left alone
                continue
            self.hooks += f"{part} "
            module.register_forward_pre_hook(self.take_keys if part == "keys" else self.merge, with_kwargs=True)
            if part != "keys":
                module.register_forward_hook(self.unmerge)

    def merge(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments
    ) -> tuple[tuple[Any, ...], Arguments] | None:
        """Hook: a part starts, on merged tokens."""
        reduction = here().reduction
        if reduction is None:
            return None
        x = self._tokens(args, kwargs)
        return (reduction(x), *args[1:]), kwargs

    def unmerge(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Hook: it has ended; every token takes the output of the one that it was merged into."""
        reduction, count = here().reduction, here().tokens
        return None if reduction is None else reduction.unmerge(output, count)

    def take_keys(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments
    ) -> tuple[tuple[Any, ...], Arguments] | None:
        """Hook: the attention starts, its keys and values of fewer tokens."""
        reduction = here().reduction
        if reduction is None:
            return None
        if self.fused(module):
            raise UnsupportedMethod(f"{self.patch.method.name} in {self.name}: {FUSED}")
        return args, {**kwargs, "encoder_hidden_states": reduction(self._tokens(args, kwargs))}

    def _tokens(self, args: tuple[Any, ...], kwargs: Arguments) -> Tensor:
        if not args or args[0].shape[1] != here().tokens:
            raise UnsupportedModel(f"a part of {self.name} is not given all tokens at once (chunked feed-forward?)")
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("encoder_hidden_states") is None:
            raise UnsupportedModel(f"the attention of {self.name} is given a mask over the image's tokens")
        x: Tensor = args[0]
        return x

    def _pruned(self, module: nn.Module, forward: Callable[..., Any], bound: Arguments, one: Pass, keep: int) -> Any:
        x: Tensor = bound[self.hidden]
        chosen = one.blocks[self.name] = Chosen(self._reduction(one, keep, x.detach()), None, x.shape[1])
        self._note(one, self.name, chosen.reduction, x)
        return self._on_chosen(forward, bound, chosen)

    def _on_chosen(self, forward: Callable[..., Any], bound: Arguments, chosen: Chosen) -> Any:
        state = here()
        state.reduction, state.tokens = chosen.reduction, bound[self.hidden].shape[1]
        output = forward(**bound)
        state.reduction = None
        return output

    def _reduction(self, one: Pass, keep: int, x: Tensor) -> Reduction:
        method, tokens = self.patch.method, x.shape[1]
        grid = grid_of(one.grid, tokens)
        if grid is None and "grid" in method.needs:
            raise UnsupportedModel(f"{method.name} needs a grid, and the {tokens} tokens of {self.name} fill none")
        origin = positions(tokens, x).expand(x.shape[0], -1)
        place = self._place(self.index, self.place)
        peers = self._peers(one, tokens)
        record = AttentionRecord(
            x, origin, 0, place, self.places, grid, has_class_token=False, step=one.step,
            peers=peers if place in peers else (), shared=one.run.shared,
        )  # fmt: skip
        if method.reuse is None or keep == tokens:
            return method.reduce(record, keep)
        held = one.run.held.get((self.stack, one.run.call))
        if held is None or held.tokens != keep or (self.first and one.due == "select"):
            held = method.reduce(record, keep)
        elif self.first and one.due == "weigh":
            held = method.reuse.weigh(held, record)
        one.run.held[self.stack, one.run.call] = held
        return held

    def _place(self, index: int, stack: int) -> int:
        """A place of its own for each block of a stack, so that what is random differs between them."""
        return index * self.places + stack

    def _peers(self, one: Pass, tokens: int) -> tuple[int, ...]:
        """Places of the blocks that choose among as many tokens in this forward."""
        shared = one.run.shared
        if ("peers", tokens) not in shared:
            shared["peers", tokens] = tuple(
                self._place(index, number)
                for number, (stack, depth) in enumerate(self.patch.depths.items())
                if stack in one.keep and one.tokens.get(stack) == tokens
                for index in range(depth)
            )
        found: tuple[int, ...] = shared["peers", tokens]
        return found
