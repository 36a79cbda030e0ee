"""The sites of methods that keep something over steps, on the blocks of a denoiser.

`TokenSite`: a block runs on the chosen tokens alone, and its self-attention sees the keys and values of all: fresh rows
are put among those of an earlier step where they come out of their projections, so that the host's own attention takes
fewer queries than keys. `MlpSite`: a block runs on all tokens, its attentions give what they gave at the last dense
step, and its MLP runs on the chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tokenprune.attention_record import AttentionRecord
from tokenprune.denoisers.here import Catch, here
from tokenprune.denoisers.host import Arguments, BlockFacts, Stack
from tokenprune.denoisers.over_steps import Memory
from tokenprune.denoisers.records import together
from tokenprune.denoisers.rotary import for_either
from tokenprune.denoisers.run import Chosen, Pass, running
from tokenprune.denoisers.site import BlockSite, check_caught
from tokenprune.errors import UnsupportedMethod
from tokenprune.state import in_backward

if TYPE_CHECKING:
    from tokenprune.denoisers.caching import CachingPatch
    from tokenprune.denoisers.patch import DenoiserPatch


class CachingSite(BlockSite):
    """What both kinds share: choosing by what the run remembers, and remembering.

    In `Run.kept`: (call, ...) of one call of a guided step, (stack, ...) of all of them.
    """

    def __init__(self, patch: DenoiserPatch, stack: Stack, index: int, place: int, places: int) -> None:
        super().__init__(patch, stack, index, place, places)
        self.over = cast("CachingPatch", patch).over

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments) -> Any:
        if in_backward():
            raise UnsupportedMethod(
                f"{self.patch.method.name} takes values of earlier steps, which are gone when a checkpointed block runs"
                " again in backward; use model.disable_gradient_checkpointing()"
            )
        if module._compiled_call_impl is not None:
            raise UnsupportedMethod(
                f"{self.patch.method.name} keeps what comes out inside of its blocks, which compiled blocks do not say;"
                " run the model without compile_repeated_blocks()"
            )
        output = super().run(module, forward, args, kwargs)
        one = self.here()
        if one is not None:
            bound = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
            self._ran(one, bound[self.hidden], output)
        return output

    def here(self) -> Pass | None:
        """The forward that runs, if it is one of this patch."""
        one = running()
        return one if one is not None and one.patch is self.patch else None

    def _pruned(self, module: nn.Module, forward: Callable[..., Any], bound: Arguments, one: Pass, keep: int) -> Any:
        if self.stack not in one.sets:
            known = one.run.kept.get((self.stack, "fixed")) or (one.run.sets.get(self.stack) if one.reuse else None)
            if known is not None:
                one.sets[self.stack] = known
            else:
                self._choose(one, keep, bound[self.hidden], bound, None, None)
        self._note(one, self.stack, one.sets[self.stack].reduction, bound[self.hidden])
        return self._on_chosen(forward, bound, one.sets[self.stack])

    def _choose(
        self, one: Pass, keep: int, x: Tensor, bound: Arguments, queries: Tensor | None, keys: Tensor | None
    ) -> None:
        super()._choose(one, keep, x, bound, queries, keys)
        kept = one.run.kept
        if self.over.fixed:
            kept[self.stack, "fixed"] = one.sets[self.stack]
            return
        index = one.sets[self.stack].reduction.kept
        dropped, stale = self._waited(one, x)
        computed = torch.zeros_like(stale).scatter(1, index, 1)
        kept[self.stack, "dropped"] = dropped + 1 - computed
        kept[self.stack, "stale"] = (stale + 1) * (1 - computed)

    def _scores(self, one: Pass, record: AttentionRecord) -> Tensor:
        if self.patch.probe is not None:  # a counted forward has no step before it
            return torch.zeros(record.hidden.shape[:2], device=record.hidden.device)
        kept, calls, copies = one.run.kept, range(len(one.run.kept)), self._copies(one, record.hidden.shape[0])

        def told(*what: str) -> list[Tensor]:
            places = [(call, *what) for call in calls]
            return [part for place in places if place in kept for part in kept[place].chunk(copies)]

        predictions, observed = told("prediction"), told(self.name, "observed")
        dropped, stale = (x.chunk(copies)[0] for x in self._waited(one, record.hidden))
        memory = Memory(
            tuple(predictions), one.run.shape[1], dropped, stale, torch.stack(observed).mean(0) if observed else None
        )
        scores = self.over.score(together(record, copies), memory)
        return scores if copies == 1 else scores.repeat(copies, 1)

    def _waited(self, one: Pass, x: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(x.shape[:2], device=x.device)
        return one.run.kept.get((self.stack, "dropped"), zero), one.run.kept.get((self.stack, "stale"), zero)

    def _ran(self, one: Pass, x: Tensor, output: Any) -> None:
        """The block has run, on all tokens x [B, N, C] or on those chosen."""
        one.run.kept["tokens"] = x.shape[1]
        if self.stack not in one.sets:
            one.run.kept.pop((self.stack, "stale"), None)


class TokenSite(CachingSite):
    """A block of which the chosen tokens are computed, attending to all."""

    def __init__(self, patch: DenoiserPatch, stack: Stack, index: int, place: int, places: int) -> None:
        super().__init__(patch, stack, index, place, places)
        facts = stack.blocks[index]
        self.rows = [Rows(self, number) for number in range(len(facts.context))]
        self.slices = tuple((name, for_either(take) if name == facts.rotary else take) for name, take in facts.slices)

    def attach(self, facts: BlockFacts) -> None:
        super().attach(facts)
        for rows, module in zip(self.rows, facts.context, strict=True):
            module.register_forward_hook(rows.extend)

    def _left_out(self, x: Tensor) -> Tensor:
        one = self.here()
        if one is None or not self.last:
            return x
        left: Tensor = one.run.kept.get((one.run.call, self.stack), x)
        return left

    def _ran(self, one: Pass, x: Tensor, output: Any) -> None:
        super()._ran(one, x, output)
        run = one.run
        if any(run.kept.get((run.call, self.name, rows.number), (-1,))[0] != run.index for rows in self.rows):
            raise UnsupportedMethod(
                f"{self.patch.method.name} keeps keys and values, and {self.name} did not put them out on their own"
                " (fused projections?); call unfuse_qkv_projections() first"
            )
        if self.last and cast("CachingPatch", self.patch).convolves and self.stack not in one.sets:
            run.kept[run.call, self.stack] = self._image(output).detach()


class Rows:
    """Keys or values: those of the tokens that are not computed are the ones of an earlier step."""

    def __init__(self, site: TokenSite, number: int) -> None:
        self.patch = site.patch
        self.site = site
        self.number = number

    def extend(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Hook: remember the rows of all tokens; give rows of all where those of the chosen ones come."""
        one = self.site.here()
        if one is None:
            return None
        run = one.run
        place = (run.call, self.site.name, self.number)
        chosen = one.sets.get(self.site.stack)
        if chosen is None:
            run.kept[place] = run.index, output.detach()
            return None
        full = self._among(one, place, output, chosen)
        run.kept[place] = run.index, full.detach()
        return full

    def _among(self, one: Pass, place: tuple[Any, ...], output: Tensor, chosen: Chosen) -> Tensor:
        text = output.shape[1] - chosen.reduction.tokens  # in front, where one projection is of both
        if self.patch.probe is not None:
            known = output.new_zeros(output.shape[0], text + self.patch.probe.tokens[self.site.stack], output.shape[2])
        elif place in one.run.kept:
            known = one.run.kept[place][1]
        else:
            raise UnsupportedMethod(
                f"{self.site.name} did not run at the dense step that fills what {self.patch.method.name} keeps; switch"
                " off what skips blocks there"
            )
        if not text:
            return chosen.bring_back(output, output, known)
        rows = chosen.bring_back(output[:, text:], output[:, text:], known[:, text:])
        return torch.cat([output[:, :text], rows], 1)


class MlpSite(CachingSite):
    """A block whose attentions are those of the last dense step and whose MLP runs on the chosen tokens."""

    def attach(self, facts: BlockFacts) -> None:
        super().attach(facts)
        assert facts.expose is not None
        assert facts.mlp is not None
        parts = [Attention(self, number) for number in range(len(facts.attentions))]
        for part, module in [*zip(parts, facts.attentions, strict=True), (Mlp(self, len(parts)), facts.mlp)]:
            facts.expose(module)
            module.register_forward_pre_hook(part.enter)
            module.register_forward_hook(part.leave, always_call=True)
        if self.over.observe is not None:
            for kind, projection in (("queries", facts.queries), ("keys", facts.keys)):
                assert projection is not None
                projection.register_forward_hook(Catch(self.patch, kind).keep)

    def _on_chosen(self, forward: Callable[..., Any], bound: Arguments, chosen: Any) -> Any:
        return forward(**bound)

    def observe(self, one: Pass, output: Tensor) -> None:
        """At a dense step, behind the self-attention that put out [B, N, C]."""
        if self.over.observe is None or self.patch.probe is not None:
            return
        check_caught(self.patch)
        record = self._record(one, output, {}, 0, here().queries, here().keys)
        one.run.kept[one.run.call, self.name, "observed"] = self.over.observe(record)


class Part:
    """The site of a part of a block, number `number` in it."""

    def __init__(self, site: MlpSite, number: int) -> None:
        self.patch = site.patch
        self.site = site
        self.number = number

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: the part starts."""
        here().clear()
        here().site = self

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: it has ended, by a result or an exception."""
        here().clear()

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """The part on what has to be computed of it."""
        one = self.site.here()
        if one is None:
            return forward(*args, **kwargs)
        place = (one.run.call, self.site.name, self.number)
        chosen = one.sets.get(self.site.stack)
        if chosen is None:
            output = forward(*args, **kwargs)
            self.whole(one, output)
        elif place not in one.run.kept and self.patch.probe is None:
            raise UnsupportedMethod(
                f"{self.site.name} did not run at the dense step that fills what {self.patch.method.name} keeps; switch"
                " off what skips blocks there"
            )
        else:
            output = self.partly(forward, args, kwargs, chosen, one.run.kept.get(place))
        one.run.kept[place] = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output)
        return output

    def whole(self, one: Pass, output: Any) -> None:
        """It has run on all tokens."""

    def partly(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments, chosen: Chosen, known: Any
    ) -> Any:
        """Its output of all tokens, with `known` from an earlier step (None while costs are counted)."""
        raise NotImplementedError


class Attention(Part):
    """Self-attention, joint attention or cross-attention."""

    def whole(self, one: Pass, output: Any) -> None:
        if self.number == 0:
            self.site.observe(one, output[0] if isinstance(output, tuple) else output)

    def partly(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments, chosen: Chosen, known: Any
    ) -> Any:
        if known is not None:
            return known
        hidden = args[0] if args else kwargs["hidden_states"]
        text = kwargs.get("encoder_hidden_states") if self.site.text else None
        return hidden if text is None else (hidden, text)


class Mlp(Part):
    """The MLP of the image tokens."""

    def partly(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments, chosen: Chosen, known: Any
    ) -> Any:
        x, *others = args
        if known is None:
            known = x
        if chosen.reduction.tokens == 0:
            return known
        computed = forward(chosen.take(x), *others, **kwargs)
        return chosen.bring_back(computed, computed, known)
