"""Visual tokens that leave between two layers of the language model.

The model hands every layer the same masks and rotary tables, for all tokens of the prompt; in front of each layer
behind a stage stands a hook that takes of them what is left. Caches of these layers are shorter: with the cache goes
which tokens each stage kept, and later masks lose the columns of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.kernels.class_attention import class_attention
from tokenprune.kernels.merge import gather
from tokenprune.lvlm.cache import StageMap
from tokenprune.lvlm.funnel import causal_mask, narrow_mask, narrow_positions, pack_left
from tokenprune.lvlm.host import LayerFacts
from tokenprune.lvlm.recipe import InsideModel
from tokenprune.recording import Forward, PlaceRecord
from tokenprune.selection.top_k import ranked

if TYPE_CHECKING:
    from tokenprune.lvlm.patch import LvlmPatch


@dataclass(eq=False)
class Inside:
    """One forward of the language model.

    Of a prompt: visual, real: [B, L] which tokens are an image's, and none of padding. rates: of each sample; finals:
    tokens behind the last stage, None where the rate says it. sure: [B, L] tokens that the first stage keeps.
    candidates: tokens at the end that are none of the prompt. index, valid: [B, M] tokens that are left, None for all.
    pending: what the next stage keeps of these. forwards: recordings of each sample. scored: keys looked at by each, at
    each stage. Of text behind a prompt: stages, and entries of the first layer's cache before it. memo: what was made
    for one of the layers, kept for the others.
    """

    stages: list[StageMap]
    entries: int = 0
    visual: Tensor | None = None
    real: Tensor | None = None
    rates: Sequence[float] = ()
    finals: Sequence[int | None] = ()
    sure: Tensor | None = None
    candidates: int = 0
    index: Tensor | None = None
    valid: Tensor | None = None
    pending: Tensor | None = None
    forwards: Sequence[Forward] = ()
    scored: list[list[int]] = field(default_factory=list)
    memo: dict[Any, Any] = field(default_factory=dict)


class LayerSite:
    """The hook in front of one layer. stage: of which this layer is the place; scores: of which it is the one that is
    looked at."""

    def __init__(self, patch: LvlmPatch, index: int, places: Sequence[int], facts: LayerFacts) -> None:
        assert patch.inside is not None
        self.patch = patch
        self.index = index
        self.recipe: InsideModel = patch.inside
        self.stage = places.index(index) if index in places else None
        at = [place + self.recipe.scored for place in places]
        self.scores = at.index(index) if index in at else None
        self.last = self.scores == len(places) - 1
        self.facts = facts

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: the layer is called."""
        now = self.patch.local.inside
        if now is None:
            return None
        if now.visual is None:
            return self._behind_a_prompt(now, args, kwargs)
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.scores is not None and self.scores == self.stage:
            self._choose(now, layer, x, self._narrow(now, kwargs))
        if self.stage is not None:
            x = self._leave(now, x)
        kwargs = self._narrow(now, kwargs)
        if self.scores is not None and self.scores != self.stage:
            self._choose(now, layer, x, kwargs)
        if args:
            return (x, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x}

    def _behind_a_prompt(self, now: Inside, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stage = next((stage for stage in reversed(now.stages) if stage.place <= self.index), None)
        if stage is None:
            return None
        mask = kwargs.get("attention_mask")
        key = (stage.place, id(mask))
        if key not in now.memo:
            x: Tensor = args[0] if args else kwargs["hidden_states"]
            now.memo[key] = _of_stage(mask, stage, now.entries, x.shape[1], self.facts.flash)
        return args, {**kwargs, "attention_mask": now.memo[key]}

    def _narrow(self, now: Inside, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's arguments for the tokens that are left."""
        index, valid = now.index, now.valid
        if index is None or valid is None:
            return kwargs
        changed = {}
        for name in ("attention_mask", "position_embeddings", "position_ids"):
            value = kwargs.get(name)
            key = (len(now.stages), name, id(value))
            if key not in now.memo:
                now.memo[key] = _at_tokens(name, value, index, valid, self.facts.flash), value
            changed[name] = now.memo[key][0]
        return {**kwargs, **{name: value for name, value in changed.items() if name in kwargs}}

    def _choose(self, now: Inside, layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Score the visual tokens among x [B, M, C], and note which stay."""
        assert now.visual is not None
        assert now.real is not None
        assert self.scores is not None
        visual, real = now.visual, now.real
        if now.index is not None:
            assert now.valid is not None
            visual, real = gather(visual, now.index) & now.valid, now.valid
        counts = visual.sum(1).tolist()
        whole = now.visual.sum(1).tolist()
        with torch.no_grad():
            scores = self._scores(now, layer, x.detach(), visual, real, kwargs)
        keep = []
        for entering, total, rate, final in zip(counts, whole, now.rates, now.finals, strict=True):
            count = self.recipe.kept(rate, self.scores, entering, total)
            if final is not None:  # exactly as many behind the last stage, and no fewer before
                count = final if self.last else max(count, final)
            keep.append(min(count, entering))
        place = torch.arange(visual.shape[1], device=x.device)
        order = ranked(scores.masked_fill(~visual, float("-inf")))
        best = torch.zeros_like(visual).scatter(1, order, place < torch.tensor(keep, device=x.device)[:, None])
        chosen = best & visual
        if now.sure is not None and self.scores == 0:
            chosen |= now.sure
        now.pending = (real & ~visual) | chosen

    def _scores(
        self, now: Inside, layer: Any, x: Tensor, visual: Tensor, real: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """[B, M]: attention of the last text token, mean over heads."""
        if now.candidates:
            real = real & (torch.arange(real.shape[1], device=real.device) < real.shape[1] - now.candidates)
        text = real & ~visual
        last = (text.cumsum(1) * text).argmax(1, keepdim=True)
        only_visual = self.recipe.softmax == "visual"
        index, valid = pack_left(visual if only_visual else real)
        now.scored.append(valid.sum(1).tolist())
        table = kwargs["position_embeddings"] if self.recipe.rotary else None
        queries = self.facts.queries(layer, gather(x, last), None if table is None else _rows(table, last))
        keys = self.facts.keys(layer, gather(x, index), None if table is None else _rows(table, index))
        attention = class_attention(queries, keys, scale=self.facts.scale, bias=valid[:, None, None]).mean(1)
        return torch.zeros(x.shape[:2], device=x.device).scatter(1, index, attention.float() * valid)

    def _leave(self, now: Inside, x: Tensor) -> Tensor:
        assert now.pending is not None
        assert now.visual is not None
        assert now.real is not None
        index, valid = pack_left(now.pending)
        now.pending = None
        now.index = index if now.index is None else gather(now.index, index)
        now.valid = valid
        padded, held = not bool(valid.all()), valid.shape[1] - now.candidates
        length = now.visual.shape[1] - now.candidates
        now.stages.append(StageMap(self.index, now.index[:, :held], valid[:, :held], length, padded))
        self._record(now)
        return gather(x, index)

    def _record(self, now: Inside) -> None:
        assert now.visual is not None
        assert now.index is not None
        assert now.valid is not None
        for row, forward in enumerate(now.forwards):
            origin = now.visual[row].cumsum(0) - 1
            tokens = now.index[row][now.valid[row]]
            kept = origin[tokens[now.visual[row][tokens]]].unsqueeze(0)
            source = torch.full((1, int(now.visual[row].sum())), -1, device=kept.device)
            source.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).unsqueeze(0))
            forward.places.append(PlaceRecord(f"layers.{self.index}", kept, source, None))


def _at_tokens(name: str, value: Any, index: Tensor, valid: Tensor, flash: bool) -> Any:
    if name == "attention_mask":
        if value is not None:
            return narrow_mask(value, index, valid, 0)
        if bool(valid.all()):
            return None
        return valid.long() if flash else causal_mask(valid, valid.shape[1])
    if value is None:
        return None
    return narrow_positions(value, index) if name == "position_ids" else _rows(value, index)


def _rows(table: Any, index: Tensor) -> Any:
    """Rows of a table [.., B or 1, M, D], or of several, at index [B, K]."""
    if isinstance(table, tuple):
        return tuple(_rows(part, index) for part in table)
    if table.ndim == 3:
        return gather(table, index)
    return torch.stack([gather(part, index) for part in table])


def _of_stage(mask: Any, stage: StageMap, entries: int, queries: int, flash: bool) -> Any:
    """The mask of text behind a prompt, for the entries of a layer behind a stage."""
    if mask is None:
        if not stage.padded:
            return None
        more = entries - stage.length + queries
        seen = torch.cat([stage.valid, stage.valid.new_ones(len(stage.valid), more)], 1)
        return seen.long() if flash else causal_mask(seen, queries)
    if mask.ndim == 2:
        prompt = gather(mask[:, : stage.length], stage.index) * stage.valid.to(mask.dtype)
        return torch.cat([prompt, mask[:, stage.length :]], 1)
    wide = mask.expand(len(stage.index), *mask.shape[1:])
    prompt = gather(wide[..., : stage.length], stage.index, dim=3)
    hidden = ~stage.valid[:, None, None]
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.cat([prompt.masked_fill(hidden, lowest), wide[..., stage.length :]], -1)
