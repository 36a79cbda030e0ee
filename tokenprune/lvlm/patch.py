"""LvlmPatch: one method on one vision-language model, from the facts of the host to the hooks on its parts.

Three hooks carry a prompt: in front of the whole (labels), in front of the model that puts image features among text
embeddings (where is an image?), and around the language model (which tokens go in, what comes out).
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import Request
from tokenprune.lvlm.cache import CacheMap, entries_of, identity_map, map_of, remember_map
from tokenprune.lvlm.costs import Given, Spent
from tokenprune.lvlm.encoded import Encoded, ProjectorSite, TowerSite, encoded_of
from tokenprune.lvlm.funnel import causal_mask, narrow_mask, narrow_positions, pack_left, renumber, repad, spread
from tokenprune.lvlm.host import LvlmHost, Scored
from tokenprune.lvlm.inside import Inside, LayerSite, remember_stages, stages_of
from tokenprune.lvlm.plan import counts_of
from tokenprune.lvlm.prefill import Prefill, mean_costs, prefills, record_left
from tokenprune.lvlm.prompt import Prompt, choose, find_images
from tokenprune.lvlm.recipe import AfterTower, InsideModel
from tokenprune.lvlm.stages import begin, refuse_inside
from tokenprune.method import Method
from tokenprune.recording import Recording

Describe = Callable[[nn.Module], LvlmHost]


@dataclass(frozen=True)
class Names:
    """Names of the forwards' parameters in order."""

    outer: tuple[str, ...]
    model: tuple[str, ...]
    text: tuple[str, ...]
    tower: tuple[str, ...]


@dataclass(eq=False)
class Call:
    """One forward, from the hook in front of `model` to the one behind the language model. visual: the placeholders
    {modality: bool [B, L]}, None where the forward brings no image. past: of the cache, None for one with every token.
    entries: of the cache. then: what the hook in front of the language model found."""

    visual: Mapping[str, Tensor] | None
    past: CacheMap | None
    entries: int
    padding: Tensor | None
    prompt: Prompt | None = None
    valid: Tensor | None = None
    map: CacheMap | None = None
    moved: bool = False


@dataclass(eq=False)
class Local:
    """What this thread is in the middle of."""

    call: Call | None = None
    labels: Tensor | None = None
    inside: Inside | None = None
    encoded: list[Encoded] = field(default_factory=list)
    latest: Encoded | None = None
    prompts: list[Prefill] = field(default_factory=list)
    given: Given = field(default_factory=lambda: Given((), {}))
    caught: dict[str, Any] = field(default_factory=dict)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.by_patch: MutableMapping[LvlmPatch, Local] = WeakKeyDictionary()


_THREAD = _OfThread()


class LvlmPatch:
    """What a patch knows for as long as it is on: plain data, no module.

    active: whether anything is left out (not at a budget of 1.0). positions: "original" ones of the kept tokens, or
    "reindex". seen: of the last prompt, for each image (tokens, tokens kept).
    """

    composes = True

    def __init__(self, describe: Describe, host: LvlmHost, adapter: str, method: Method, request: Request) -> None:
        self.key = uuid4().hex
        self.describe = describe
        self.adapter = adapter
        self.method = method
        self.after: AfterTower | None = method.after_tower
        self.inside: InsideModel | None = method.inside_model
        self.places = self.inside.places(len(host.layers)) if self.inside is not None else ()
        self.budget = request.budget
        option = method.schedule.option
        self.share = float(request.budget.value if request.budget.kind == "own" else getattr(method.schedule, option))
        self.positions = request.positions or "original"
        self.active = not request.budget.is_full
        self.names = Names(*(_parameters(part) for part in (host.outer, host.model, host.text, host.tower)))
        self.tokens, self.inputs = host.tokens, host.inputs
        self.masks_first, self.window = host.masks_first, host.window
        self.refused = host.refused
        self.whole = host.outer is not host.model
        self.notes = list(host.notes)
        self.handle: RemovableHandle | None = None
        self.seen: tuple[tuple[float, float], ...] = ()
        self.spent = Spent()
        self.prompts: list[Prefill] = []
        self.model: weakref.ref[nn.Module] | None = None
        self.recordings: list[Recording] = []

    @property
    def local(self) -> Local:
        """This thread's part."""
        return _THREAD.by_patch.setdefault(self, Local())

    def enter_outer(self, outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: the whole is called. Labels are copied, as those of tokens that are left out will be ignored."""
        self.model = weakref.ref(outer)
        bound = _bind(self.names.outer, args, kwargs)
        labels = bound.get("labels")
        self.local.labels = labels.clone() if isinstance(labels, Tensor) else None
        if self.local.labels is None or not self.active:
            return None
        return (), {**bound, "labels": self.local.labels}

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: `model` is called. Finds the placeholders, and puts a mask and positions right for a pruned cache."""
        local = self.local
        local.call, local.inside, local.encoded = None, None, []
        if not self.active:
            return None
        if not self.whole:
            self.model = weakref.ref(model)
        bound = _bind(self.names.model, args, kwargs)
        cache = bound.get("past_key_values")
        past, mask = map_of(cache), bound.get("attention_mask")
        call = Call(self._placeholders(model, bound, cache), past, entries_of(cache), _padding(mask))
        local.call = call
        if past is None or not self.masks_first:
            return None
        batch, more = _shape(bound)
        return (), {**bound, "attention_mask": _of_entries(mask, past, call.entries + more, batch)}

    def _placeholders(self, model: Any, bound: Mapping[str, Any], cache: Any) -> dict[str, Tensor] | None:
        """{modality: where its placeholders are [B, L]}; None where the forward brings no image."""
        ids, embeds = bound.get("input_ids"), bound.get("inputs_embeds")
        if not any(_given(bound.get(name)) for name in self.inputs):
            if ids is None and embeds is not None and embeds.shape[1] > 1:
                raise UnsupportedModel(
                    "inputs_embeds alone do not say which of them are an image's; pass input_ids and pixel_values, or"
                    " inputs_embeds with the placeholders' embeddings in them and pixel_values, or unpatch the model"
                )
            return None
        reason = self.refused(bound)
        if reason:
            raise UnsupportedModel(reason)
        outputs = bound.get("mm_encoder_outputs")
        for modality in self.tokens:
            output = outputs.get(modality) if isinstance(outputs, Mapping) else None
            if output is not None:
                encoded = encoded_of(output)
                if encoded is None or encoded.key != self.key:
                    raise UnsupportedModel(
                        f"the {modality} features were made without this patch, or a prompt is prefilled in chunks, of"
                        " which each has a part of an image; encode images behind the patch and generate without"
                        " prefill_chunk_size"
                    )
                self.local.encoded.append(encoded)
        found = {}
        for modality, token in self.tokens.items():
            if ids is not None:
                found[modality] = ids == token
            else:
                assert embeds is not None
                place = torch.full((), token, dtype=torch.long, device=embeds.device)
                found[modality] = (embeds == model.get_input_embeddings()(place)).all(-1)
        return found if any(bool(where.any()) for where in found.values()) else None

    def enter_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of the language model for the tokens that are kept, None where they stay as they are."""
        call = self.local.call
        if call is None:
            return None
        bound = _bind(self.names.text, args, kwargs)
        if self.inside is not None:
            self.local.inside = self._between_layers(text, call, bound)
            return None
        if call.visual is None:
            return self._continue(call, bound)
        return (), self._prune(call, bound)

    def _continue(self, call: Call, bound: dict[str, Any]) -> Any:
        """More text behind a pruned prompt: a mask for the entries of the cache, positions as they were counted."""
        past = call.past
        if past is None:
            return None
        changed: dict[str, Any] = {}
        if not self.masks_first:
            batch, more = _shape(bound)
            changed["attention_mask"] = _of_entries(bound.get("attention_mask"), past, call.entries + more, batch)
        if past.shift is not None:
            changed["position_ids"] = self._counted(call, bound) - past.shift
        return (), {**bound, **changed}

    def _between_layers(self, text: nn.Module, call: Call, bound: Mapping[str, Any]) -> Inside | None:
        """What the hooks in front of the layers need in this forward, None where nothing leaves."""
        cache = bound.get("past_key_values")
        if call.visual is None:
            stages = stages_of(cache) if cache is not None else []
            return Inside(stages, call.entries) if stages else None
        refuse_inside(text, cache, call.entries, bound.get("deepstack_visual_embeds"), self.places)
        visual = torch.stack(list(call.visual.values())).any(0)
        real = torch.ones_like(visual) if call.padding is None else call.padding
        images = find_images(call.visual, self.local.encoded)
        self.prompts = self.local.prompts = prefills(self, images, self.local.encoded, real.sum(1).tolist())
        return begin(self, images, visual, real)

    def _prune(self, call: Call, bound: dict[str, Any]) -> dict[str, Any]:
        """The language model's arguments for the tokens that are kept."""
        assert call.visual is not None
        embeds: Tensor = bound["inputs_embeds"]
        batch, length = embeds.shape[:2]
        logical = call.entries + (call.past.removed if call.past is not None else 0)
        if self.window is not None and logical + length > self.window:
            raise UnsupportedModel(
                f"a prompt of {logical + length} tokens is longer than the sliding window of {self.window} tokens,"
                " which would count kept tokens only; shorten the prompt, or unpatch the model"
            )
        images = find_images(call.visual, self.local.encoded)
        real = embeds.new_ones(batch, length, dtype=torch.bool) if call.padding is None else call.padding[:, -length:]
        self.prompts = self.local.prompts = prefills(self, images, self.local.encoded, real.sum(1).tolist())
        prompt = choose(self, images, embeds, call.visual, bound.get("deepstack_visual_embeds"), call.padding)
        keep = prompt.keep & real
        index, valid = pack_left(keep)
        padded = not bool(valid.all())
        call.prompt, call.valid = prompt, valid
        prompt.keep = keep
        everything = torch.arange(length, device=index.device).expand(batch, -1)
        call.moved = not torch.equal(index, everything)
        self._ignore_labels(call.visual, keep)
        positions = self._counted(call, bound)
        kept = narrow_positions(positions, index)
        before = call.past or identity_map(batch, call.entries, embeds.device)
        shift = before.shift
        if shift is not None:
            kept, positions = kept - shift, positions - shift
        if self.positions == "reindex":
            kept, moved = renumber(positions, real, valid)
            shift = moved if shift is None else shift + moved
        grown = torch.arange(before.length, logical, device=embeds.device).expand(batch, -1)
        call.map = CacheMap(
            torch.cat([before.index, grown, logical + index], 1),
            torch.cat([before.valid, torch.ones_like(grown, dtype=torch.bool), valid], 1),
            logical + length,
            shift,
            before.padded or padded,
        )
        changed = {
            "inputs_embeds": torch.gather(prompt.embeds, 1, index[..., None].expand(-1, -1, embeds.shape[2])),
            "position_ids": kept,
            "attention_mask": self._mask(call, bound.get("attention_mask"), index, valid),
        }
        if prompt.deepstack is not None:
            where = bound["visual_pos_masks"].gather(1, index) & valid
            changed["visual_pos_masks"] = where
            changed["deepstack_visual_embeds"] = [
                deep.flatten(0, 1)[_flat(index, length)[where]] for deep in prompt.deepstack
            ]
        if bound.get("past_key_values") is not None:
            remember_map(bound["past_key_values"], call.map)
        return {**bound, **changed}

    def _mask(self, call: Call, mask: Any, index: Tensor, valid: Tensor) -> Any:
        past = call.past.valid if call.past is not None else valid.new_ones(len(valid), 0)
        seen = torch.cat([past, valid.new_ones(len(valid), call.entries - past.shape[1]), valid], 1)
        if isinstance(mask, Mapping):
            return {
                # None is causal attention of every token (no attention that materialises masks is given none).
                kind: causal_mask(seen, valid.shape[1]) if one is None else narrow_mask(one, index, valid, call.entries)
                for kind, one in mask.items()
            }
        if mask is None:  # without one, positions with gaps would be read as several sequences in a row
            return seen.long()
        if mask.ndim == 2 and call.past is not None and not self.masks_first:
            mask = call.past.mask(mask)
        return narrow_mask(mask, index, valid, call.entries)

    def _counted(self, call: Call, bound: Mapping[str, Any]) -> Tensor:
        """Positions of the tokens, counted here where the language model would count them itself."""
        positions = bound.get("position_ids")
        if positions is not None:
            return positions  # type: ignore[no-any-return]
        embeds = bound["inputs_embeds"]
        seen = call.entries + (call.past.removed if call.past is not None else 0)
        return torch.arange(seen, seen + embeds.shape[1], device=embeds.device).unsqueeze(0)

    def _ignore_labels(self, visual: Mapping[str, Tensor], keep: Tensor) -> None:
        labels = self.local.labels
        if labels is None:
            return
        gone = ~keep & torch.stack(list(visual.values())).any(0)
        # Nothing predicts the first token that is kept, but the one before it would hold its own state.
        first = keep & (keep.cumsum(1) == 1)
        first[:, 1:] &= gone[:, :-1]
        labels[:, -keep.shape[1] :].masked_fill_(gone | first, -100)

    def leave_text(self, output: Any) -> Any:
        """The language model's output, its last hidden state with the prompt's length again."""
        call, self.local.call = self.local.call, None
        inside, self.local.inside = self.local.inside, None
        if inside is not None and call is not None and call.visual is not None and output is not None:
            return self._behind_layers(inside, call, output)
        self.local.labels = None
        if call is None or call.prompt is None or call.map is None or output is None:
            return None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            remember_map(cache, call.map)
        keep, valid = call.prompt.keep, call.valid
        assert valid is not None
        if call.moved:
            output.last_hidden_state = spread(output.last_hidden_state, keep, valid)
        return output

    def _behind_layers(self, inside: Inside, call: Call, output: Any) -> Any:
        assert inside.index is not None
        assert inside.valid is not None
        assert inside.visual is not None
        assert call.visual is not None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            remember_stages(cache, inside.stages)
        keep = torch.zeros_like(inside.visual).scatter(1, inside.index, inside.valid)
        self._ignore_labels(call.visual, keep)
        self.local.labels = None
        images = len(self.seen)
        left = int((keep & inside.visual).sum())
        self.seen = ((sum(size for size, _ in self.seen) / images, left / images),)
        record_left(self.local.prompts, inside)
        if inside.index.shape[1] < keep.shape[1]:
            output.last_hidden_state = spread(output.last_hidden_state, keep, inside.valid)
        return output

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: `model` has ended, by a result or an exception."""
        self.local.call, self.local.inside, self.local.encoded = None, None, []

    def count_alone(self, scores: Tensor | None, tokens: int) -> int:
        """How many of its tokens an image keeps where all images have as many."""
        assert self.after is not None
        if self.after.count is not None and self.budget.kind == "default" and scores is not None:
            return self.after.count(scores)
        return counts_of(self.budget, self.share, [tokens])[0]

    def release(self) -> None:
        """Remove the hook outside of `model`."""
        if self.handle is not None:
            self.handle.remove()

    def summary(self) -> dict[str, Any]:
        """The data of the report."""
        notes = list(self.notes)
        if self.active and not self.seen:
            notes.append("the budget is solved at the first prompt with an image: sizes are not known before")
        flops = mean_costs(self)
        places = []
        if self.seen:
            before, after = (round(fmean(pair[side] for pair in self.seen), 1) for side in (0, 1))
            name = ", ".join(f"layers.{place}" for place in self.places) or "after the tower"
            places.append({"name": name, "tokens_in": before, "tokens_out": after})
        return {
            "method": self.method.name,
            "paper": self.method.paper,
            "family": self.adapter,
            "budget": str(self.budget),
            "positions": self.positions,
            "flops_before": round(flops[0]),
            "flops_after": round(flops[1]),
            "flops_ratio": flops[1] / flops[0] if flops[0] else 1.0,
            "places": places,
            "skipped": {},
            "notes": notes,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recordings": [], "handle": None, "model": None, "prompts": [], "key": uuid4().hex}

    def __deepcopy__(self, memo: dict[int, Any]) -> LvlmPatch:
        copy: LvlmPatch = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(self.__getstate__())
        return copy


class TextSite:
    """Hooks around the language model."""

    def __init__(self, patch: LvlmPatch) -> None:
        self.patch = patch

    def enter(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: it is called, with the embeddings of text and images."""
        return self.patch.enter_text(text, args, kwargs)

    def leave(self, text: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook: it has ended."""
        return self.patch.leave_text(output)


def prepare(describe: Describe, model: nn.Module, adapter: str, method: Method, request: Request) -> LvlmPatch:
    """The patch of a vision-language model; nothing is attached yet.

    Raises:
        UnsupportedMethod: the method does nothing behind a tower, or needs what this model does not have.
        BudgetError: the budget cannot be met.
    """
    host = describe(model)
    if request.steps is not None:
        raise UnsupportedMethod(f"steps= is for denoising runs, and {type(host.outer).__name__} has none")
    if method.after_tower is None and method.inside_model is None:
        raise UnsupportedMethod(
            f"{method.name} works inside an image tower; patch(model.{_name(host.outer, host.tower)}, {method.name!r},"
            " ...) works, or a method for what comes behind it, such as 'top_k'"
        )
    if request.positions not in (None, "original", "reindex"):
        raise UnsupportedMethod(f"positions={request.positions!r}: use 'original' or 'reindex'")
    if method.inside_model is not None and (request.positions == "reindex" or host.layer is None):
        raise UnsupportedMethod(
            f"{method.name} leaves tokens out between layers, where "
            + (
                "their positions are used already; leave out positions="
                if host.layer
                else "this model's caches differ;"
            )
            + " 'top_k' and others that work behind the tower take it"
        )
    if getattr(method.schedule, "at", None) is not None or request.budget.kind == "schedule":
        raise BudgetError(
            f"{method.name} leaves tokens out once, behind the tower: there are no places to name; use keep=,"
            " tokens= or flops="
        )
    missing = method.needs - {"queries", "keys", "language model", "grid"} - host.offers
    if missing:
        raise UnsupportedMethod(
            f"{method.name} needs {' and '.join(f'a {part}' for part in sorted(missing))}, which the image tower"
            f" {type(host.tower).__name__} does not have"
        )
    patch = LvlmPatch(describe, host, adapter, method, request)
    if patch.active and patch.after and patch.after.looks_at_attention and _scored(host, patch) is None:
        raise UnsupportedMethod(
            f"{method.name} looks at the attention of the image tower, and that of a {type(host.tower).__name__} is not"
            " known; 'uniform' and 'divprune' work with any"
        )
    return patch


def attach(host: LvlmHost, patch: LvlmPatch) -> None:
    """Put the patch on the host's parts, innermost."""
    if patch.whole:
        patch.handle = host.outer.register_forward_pre_hook(patch.enter_outer, with_kwargs=True)
    host.model.register_forward_pre_hook(patch.enter, with_kwargs=True)
    host.model.register_forward_hook(patch.leave, always_call=True)
    if not patch.active:
        return
    site = TextSite(patch)
    host.text.register_forward_pre_hook(site.enter, with_kwargs=True)
    host.text.register_forward_hook(site.leave, prepend=True)
    scored = _scored(host, patch)
    TowerSite(patch, host, scored).attach(host, scored)
    for index in _hooked(patch, len(host.layers)):
        assert host.layer is not None
        layer_site = LayerSite(patch, index, patch.places, host.layer(index))
        host.layers[index].register_forward_pre_hook(layer_site.enter, with_kwargs=True)
    if host.projector is not None:
        merges = host.plain and patch.after is not None and patch.after.merges
        host.projector.register_forward_pre_hook(ProjectorSite(patch, merges).enter, with_kwargs=True)
    if host.packs is not None:
        host.model.__class__ = host.packs


def _scored(host: LvlmHost, patch: LvlmPatch) -> Scored | None:
    after = patch.after
    return host.scored(after.layer) if after is not None and after.looks_at_attention else None


def _hooked(patch: LvlmPatch, depth: int) -> range:
    """Layers in front of which a hook stands: from the first that is looked at on."""
    return range(patch.places[0] + min(0, patch.inside.scored), depth) if patch.inside is not None else range(0)


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _given(value: Any) -> bool:
    return value is not None and (not isinstance(value, Mapping) or any(part is not None for part in value.values()))


def _padding(mask: Any) -> Tensor | None:
    """Which tokens are none of padding [B, tokens], None where no 2-D mask says."""
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _flat(index: Tensor, length: int) -> Tensor:
    return index + torch.arange(len(index), device=index.device)[:, None] * length


def _shape(bound: Mapping[str, Any]) -> tuple[int, int]:
    tokens = bound["inputs_embeds"] if bound.get("inputs_embeds") is not None else bound["input_ids"]
    return int(tokens.shape[0]), int(tokens.shape[1])


def _of_entries(mask: Any, past: CacheMap, entries: int, batch: int) -> Any:
    """A mask of text behind a pruned prompt, for the entries of the cache."""
    if mask is None and past.padded:
        return torch.cat([past.valid, past.valid.new_ones(batch, entries - past.entries)], 1).long()
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return past.mask(mask)
    if isinstance(mask, Tensor) and mask.ndim == 4 and past.padded:
        return repad(mask, past.valid)
    return mask


def _name(model: nn.Module, part: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part), "vision_tower")
