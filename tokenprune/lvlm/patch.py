"""LvlmPatch: one method on one vision-language model, from the facts of the host to the hooks on its parts.

Three hooks carry a prompt: in front of the whole (labels), in front of the model that puts image features among text
embeddings (where is an image?), and around the language model (which tokens go in, what comes out).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.errors import UnsupportedModel
from tokenprune.family import Portable, Request
from tokenprune.lvlm.cache import entries_of, map_of
from tokenprune.lvlm.costs import Spent
from tokenprune.lvlm.encoded import encoded_of
from tokenprune.lvlm.host import LvlmHost
from tokenprune.lvlm.local import Call, Local, arguments_around, bind, local_of, mask_of_entries, shape_of
from tokenprune.lvlm.plan import counts_of
from tokenprune.lvlm.prefill import Prefill, mean_costs
from tokenprune.lvlm.recipe import AfterTower, InsideModel
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


class LvlmPatch(Portable):
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
        return local_of(self)

    def enter_outer(self, outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: the whole is called. Labels are copied, as those of tokens that are left out will be ignored."""
        self.model = weakref.ref(outer)
        bound = bind(self.names.outer, args, kwargs)
        self.local.candidates = _candidates(bound)
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
        bound = bind(self.names.model, args, kwargs)
        cache = bound.get("past_key_values")
        past, mask = map_of(cache), bound.get("attention_mask")
        call = Call(self._placeholders(model, bound, cache), past, entries_of(cache), _padding(mask))
        if not self.whole and call.visual is not None:
            around = arguments_around(model)
            local.candidates = _candidates({**bound, "logits_to_keep": around.get("logits_to_keep")})
            if isinstance(around.get("labels"), Tensor):
                whole = type(around["self"]).__name__
                raise UnsupportedModel(
                    f"labels are given to a {whole}, and only the {type(model).__name__} in it is patched: those of"
                    f" tokens that are left out would count; tokenprune.patch(model, {self.method.name!r}, ...) of the"
                    f" {whole} works"
                )
        local.call = call
        if past is None or not self.masks_first:
            return None
        batch, more = shape_of(bound)
        return (), {**bound, "attention_mask": mask_of_entries(mask, past, call.entries + more, batch)}

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
                encoded = encoded_of(output, self.key)
                if encoded is None:
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

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: `model` has ended, by a result or an exception."""
        local = self.local
        local.call, local.inside, local.labels, local.candidates, local.encoded = None, None, None, 0, []

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

    def left_behind(self) -> dict[str, Any]:
        """See `Portable`."""
        return {"recordings": [], "handle": None, "model": None, "prompts": [], "key": uuid4().hex}

    def __deepcopy__(self, memo: dict[int, Any]) -> LvlmPatch:
        copy: LvlmPatch = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__setstate__(self.__getstate__())
        return copy


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _candidates(bound: Mapping[str, Any]) -> int:
    """Tokens behind the prompt, which assisted generation and prompt lookup append to the prompt's own forward: they
    alone ask for several logits where images are encoded before and a cache is filled."""
    logits = bound.get("logits_to_keep")
    generates = _given(bound.get("mm_encoder_outputs")) and bound.get("past_key_values") is not None
    return logits - 1 if generates and isinstance(logits, int) and logits > 1 else 0


def _given(value: Any) -> bool:
    return value is not None and (not isinstance(value, Mapping) or any(part is not None for part in value.values()))


def _padding(mask: Any) -> Tensor | None:
    """Which tokens are none of padding [B, tokens], None where no 2-D mask says."""
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
