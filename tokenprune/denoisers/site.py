"""Site: the code of a patch that runs inside one block of a denoiser.

A block computes only the chosen tokens and puts them back among all, so that whatever stands between two blocks
(control residuals, caches, hooks of the user's own) sees the full grid; the last block of a stack recovers the dropped.
The site runs beneath everything that replaces a block's `forward` on the instance (offloading, caches): the block's
class is exchanged, and a native hook hands the site over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord, CrossAttention
from tokenprune.denoisers.here import Catch, here
from tokenprune.denoisers.host import Arguments, BlockFacts, Stack
from tokenprune.denoisers.records import grid_of, image_heads, split_heads, together
from tokenprune.denoisers.run import Chosen, Pass, running
from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.method import Method
from tokenprune.recording import PlaceRecord
from tokenprune.reduction import Reduction
from tokenprune.restore import attended_stand_ins, stand_ins
from tokenprune.state import TokenState, in_backward, recall, remember
from tokenprune.tables import positions

if TYPE_CHECKING:
    from tokenprune.denoisers.patch import DenoiserPatch


class BlockSite:
    """Block `index` of a stack of `depth`; `place` of `places` is the stack's number."""

    def __init__(self, patch: DenoiserPatch, stack: Stack, index: int, place: int, places: int) -> None:
        facts = stack.blocks[index]
        self.patch = patch
        self.stack = stack.name
        self.name = facts.name
        self.index, self.place, self.places = index, place, places
        self.first, self.last = index == 0, index == len(stack.blocks) - 1
        self.depth = len(stack.blocks)
        self.arguments, self.hidden, self.text = facts.arguments, facts.hidden, facts.text
        self.returned, self.slices = facts.returned, facts.slices
        self.heads, self.scale, self.text_first = facts.heads, facts.scale, facts.text_first
        self.before, self.rotate, self.cross = facts.before, facts.rotate, facts.cross
        self.hooks = ""

    @staticmethod
    def narrowed(facts: BlockFacts, method: Method) -> list[nn.Module]:
        """Modules in the block that put out fewer tokens than it does."""
        return list(facts.module.children())

    def attach(self, facts: BlockFacts) -> None:
        """Put the hooks on the block."""
        facts.module.register_forward_pre_hook(self.enter, prepend=True)
        facts.module.register_forward_hook(self.leave, always_call=True)
        if not self.first or self.depth == 1:
            return
        caught: dict[str, nn.Module | None] = {}
        if self.patch.method.needs & {"queries", "keys"}:
            caught.update(queries=facts.queries, keys=facts.keys)
        if "cross" in self.patch.method.needs and facts.cross is not None:
            caught.update(cross_queries=facts.cross.queries, cross_keys=facts.cross.keys)
        for kind, module in caught.items():
            if module is not None:
                module.register_forward_hook(Catch(self.patch, kind).keep)
                self.hooks += f"{kind} "

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: the block starts."""
        here().clear()
        here().site, here().hooks = self, self.hooks

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: it has ended, by a result or an exception."""
        here().clear()

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """The block on the chosen tokens, its output with all of them. Its own forward is called in one way always, so
        that compiled blocks share their graphs."""
        bound = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        x: Tensor = bound[self.hidden]
        if in_backward():
            return self._again(forward, bound)
        one = running()
        keep = one.keep.get(self.stack) if one is not None and one.patch is self.patch else None
        if one is not None and self.first:
            self.patch.mark(self.stack, "enter", x)
        if one is None or keep is None:
            output = forward(**bound)
        else:
            output = self._pruned(module, forward, bound, one, keep)
        if one is not None and self.last:
            self.patch.mark(self.stack, "leave", x)
        if torch.is_grad_enabled() or any(isinstance(v, Tensor) and v.requires_grad for v in bound.values()):
            remember(x, {} if one is None else one.blocks)
        return output

    def _again(self, forward: Callable[..., Any], bound: Arguments) -> Any:
        """The block when gradient checkpointing runs it once more: on what it computed in the forward."""
        x: Tensor = bound[self.hidden]
        blocks: dict[str, Chosen] | None = recall(x)
        if blocks is None and self.patch.active:
            raise UnsupportedModel(
                f"gradient checkpointing runs {self.name} once more without knowing which tokens it computed;"
                " checkpoint each block by itself (enable_gradient_checkpointing), or blocks with nothing between them"
            )
        chosen = (blocks or {}).get(self.name)
        output = forward(**bound) if chosen is None else self._on_chosen(forward, bound, chosen)
        if blocks is not None:
            remember(self._image(output), blocks)  # a block behind it in a group that is checkpointed at once
        return output

    def _pruned(self, module: nn.Module, forward: Callable[..., Any], bound: Arguments, one: Pass, keep: int) -> Any:
        x: Tensor = bound[self.hidden]
        if self.first and one.reuse and self.stack in one.run.sets:
            one.sets[self.stack] = one.run.sets[self.stack]  # chosen by the same step's other call
        if self.first and self.depth > 1 and self.stack not in one.sets:
            output = forward(**bound)
            check_caught(self.patch)
            self._choose(one, keep, self._image(output), bound, here().queries, here().keys)
            return output
        if self.stack not in one.sets:
            queries, keys = self._project(module, bound)
            self._choose(one, keep, x, bound, queries, keys)
        if self.first and self.depth > 1:
            return forward(**bound)
        chosen = one.blocks[self.name] = one.sets[self.stack]
        self._note(one, self.stack, chosen.reduction, x)
        return self._on_chosen(forward, bound, chosen)

    def _note(self, one: Pass, name: str, reduction: Reduction, x: Tensor) -> None:
        """Record which of the tokens of x [B, N, C] are computed, where that is asked for."""
        if one.forward is None or any(place.name == name for place in one.forward.places):
            return
        batch, tokens = x.shape[:2]
        origin = positions(tokens, x).expand(batch, -1)
        merged = reduction.moved is not None or reduction.mixes
        one.forward.places.append(
            PlaceRecord(
                name,
                reduction.follow(origin),
                reduction.source(tokens),
                reduction.merged_sizes(torch.ones(batch, tokens, device=x.device)) if merged else None,
                grid_of(one.grid, tokens),
            )
        )

    def _on_chosen(self, forward: Callable[..., Any], bound: Arguments, chosen: Chosen) -> Any:
        x: Tensor = bound[self.hidden]
        tokens = x.shape[1]
        text = bound[self.text].shape[1] if self.text and bound.get(self.text) is not None else 0
        entered = chosen.take(x)
        bound = {**bound, self.hidden: entered}
        for name, take in self.slices:
            if bound.get(name) is not None:
                bound[name] = take(bound[name], chosen.index, tokens, text)
        output = forward(**bound)
        reduced = self._image(output)
        if self.patch.recover == "gain" and chosen.near is not None:
            full = x + chosen.near.take(reduced - entered)
        elif self.last and chosen.near is not None:
            full = chosen.near.take(reduced)
        else:
            full = chosen.bring_back(reduced, entered, self._left_out(x))
        if self.returned is None:
            return full
        return tuple(full if i == self.returned else part for i, part in enumerate(output))

    def _left_out(self, x: Tensor) -> Tensor:
        """[B, N, C] that holds the value of the tokens not computed behind the block which x enters."""
        return x

    def _image(self, output: Any) -> Tensor:
        image: Tensor = output if self.returned is None else output[self.returned]
        return image

    def _project(self, module: nn.Module, bound: Arguments) -> tuple[Tensor | None, Tensor | None]:
        if not self.patch.method.needs & {"queries", "keys"}:
            return None, None
        if self.before is None:
            raise UnsupportedModel(f"{self.name} is a stack of its own, and its queries are not known before it")
        with torch.no_grad():  # what checkpointing runs once more does not score again
            return self.before(module, bound)

    def _choose(
        self, one: Pass, keep: int, x: Tensor, bound: Arguments, queries: Tensor | None, keys: Tensor | None
    ) -> None:
        """Score the tokens of x [B, N, C] and choose `keep` of them, the same for all copies of an image."""
        method, batch, tokens = self.patch.method, x.shape[0], x.shape[1]
        start = bound[self.text].shape[1] if self.text_first and self.text and bound.get(self.text) is not None else 0
        record = self._record(one, x, bound, start, queries, keys)
        copies = self._copies(one, batch)
        scores = self._scores(one, record)
        if copies > 1 and scores is not None:
            scores = scores.view(copies, batch // copies, -1).mean(0)
        reduction = method.select(scores, together(record, copies), keep)
        assert isinstance(reduction, Reduction)
        reduction = reduction.tiled(copies)
        near = None
        if self.patch.recover != "residual":
            if method.similar_by == "attention":
                known = record.log_sums[0] if record.log_sums else None
                near = attended_stand_ins(reduction, *record.rotated(), self.scale, known)
            else:
                state = TokenState(tokens, tokens, grid=grid_of(one.grid, tokens))
                near = stand_ins(state, reduction, x.detach())
        one.sets[self.stack] = one.run.sets[self.stack] = Chosen(reduction, near, tokens)

    def _copies(self, one: Pass, batch: int) -> int:
        """How many images of the batch, one after the other, compute the same tokens."""
        return batch if self.patch.shared else one.run.copies if batch == one.run.shape[0] else 1

    def _record(
        self, one: Pass, x: Tensor, bound: Arguments, start: int, queries: Tensor | None, keys: Tensor | None
    ) -> AttentionRecord:
        batch, tokens = x.shape[:2]
        return AttentionRecord(
            hidden=x.detach(),
            origin=positions(tokens, x).expand(batch, -1),
            num_prefix_tokens=0,
            place=self.place,
            depth=self.places,
            grid=grid_of(one.grid, tokens),
            has_class_token=False,
            scale=self.scale,
            queries=image_heads(queries, self.heads, tokens, start),
            keys=image_heads(keys, self.heads, tokens, start),
            rotate=self.rotate(bound, tokens),
            cross=self._crossed(bound),
            step=one.step,
            log_sums=[] if self.patch.recover != "residual" and self.patch.method.similar_by == "attention" else None,
        )

    def _scores(self, one: Pass, record: AttentionRecord) -> Tensor | None:
        score = self.patch.method.score
        return score(record) if score is not None else None

    def _crossed(self, bound: Arguments) -> CrossAttention | None:
        queries, keys = here().cross_queries, here().cross_keys
        if self.cross is None or queries is None or keys is None:
            return None
        bias = bound.get(self.cross.bias) if self.cross.bias is not None else None
        return CrossAttention(
            split_heads(queries.detach(), self.cross.heads),
            split_heads(keys.detach(), self.cross.heads),
            self.cross.scale,
            None if bias is None else bias.unsqueeze(1),
        )


def check_caught(patch: DenoiserPatch) -> None:
    cross = here().cross_keys if here().cross_queries is not None else None
    for kind, caught in (("queries", here().queries), ("keys", here().keys), ("cross", cross)):
        if kind in patch.method.needs and caught is None:
            what = "the cross-attention's queries and keys" if kind == "cross" else kind
            raise UnsupportedMethod(
                f"{patch.method.name} needs {what}, and the attention no longer puts them out on their own (fused"
                " projections?); unfuse them, or take a method that needs none, such as 'random'"
            )
