"""TextSite: the hooks around the language model, which tokens go in and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModel
from tokenprune.lvlm.cache import CacheMap, follow, identity_map, remember_map, remember_stages, stages_of
from tokenprune.lvlm.funnel import causal_mask, narrow_mask, narrow_positions, pack_left, renumber, spread
from tokenprune.lvlm.inside import Inside
from tokenprune.lvlm.local import Call, bind, mask_of_entries, shape_of
from tokenprune.lvlm.prefill import prefills, record_left
from tokenprune.lvlm.prompt import choose, find_images
from tokenprune.lvlm.stages import begin, refuse_inside

if TYPE_CHECKING:
    from tokenprune.lvlm.patch import LvlmPatch


class TextSite:
    """Hooks around the language model."""

    def __init__(self, patch: LvlmPatch) -> None:
        self.patch = patch

    def enter(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: it is called, with the embeddings of text and images; those of the tokens that are kept go on."""
        call = self.patch.local.call
        if call is None:
            return None
        bound = bind(self.patch.names.text, args, kwargs)
        if self.patch.inside is not None:
            self.patch.local.inside = self._between_layers(text, call, bound)
            follow(bound.get("past_key_values"), "stages")
            return None
        changed = self._continue(call, bound) if call.visual is None else ((), self._prune(call, bound))
        follow(bound.get("past_key_values"), "map")
        return changed

    def _continue(self, call: Call, bound: dict[str, Any]) -> Any:
        """More text behind a pruned prompt: a mask for the entries of the cache, positions as they were counted."""
        past = call.past
        if past is None:
            return None
        changed: dict[str, Any] = {}
        batch, more = shape_of(bound)
        self._check_window(call.entries + past.removed + more)
        if not self.patch.masks_first:
            changed["attention_mask"] = mask_of_entries(bound.get("attention_mask"), past, call.entries + more, batch)
        if past.shift is not None:
            changed["position_ids"] = self._counted(call, bound) - past.shift
        return (), {**bound, **changed}

    def _check_window(self, tokens: int) -> None:
        window = self.patch.window
        if window is not None and tokens > window:
            raise UnsupportedModel(
                f"{tokens} tokens, those left out among them, are more than the sliding window of {window}, which would"
                " count kept tokens only; shorten the prompt or the answer, or unpatch the model"
            )

    def _between_layers(self, text: nn.Module, call: Call, bound: Mapping[str, Any]) -> Inside | None:
        """What the hooks in front of the layers need in this forward, None where nothing leaves."""
        cache = bound.get("past_key_values")
        if call.visual is None:
            stages = stages_of(cache) if cache is not None else []
            if stages and stages[0].place < self.patch.places[0]:
                raise UnsupportedModel(
                    f"this cache lost tokens in front of layer {stages[0].place}, under another patch than this one,"
                    f" whose first place is layer {self.patch.places[0]}; continue it under that patch, or run the"
                    " prompt anew"
                )
            return Inside(list(stages), call.entries) if stages else None
        refuse_inside(text, cache, call.entries, bound.get("deepstack_visual_embeds"), self.patch.places)
        visual = torch.stack(list(call.visual.values())).any(0)
        real = torch.ones_like(visual) if call.padding is None else call.padding
        images = find_images(call.visual, self.patch.local.encoded)
        self.patch.prompts = self.patch.local.prompts = prefills(
            self.patch, images, self.patch.local.encoded, (real.sum(1) - self.patch.local.candidates).tolist()
        )
        return begin(self.patch, images, visual, real)

    def _prune(self, call: Call, bound: dict[str, Any]) -> dict[str, Any]:
        """The language model's arguments for the tokens that are kept."""
        assert call.visual is not None
        embeds: Tensor = bound["inputs_embeds"]
        batch, length = embeds.shape[:2]
        logical = call.entries + (call.past.removed if call.past is not None else 0)
        self._check_window(logical + length)
        images = find_images(call.visual, self.patch.local.encoded)
        real = embeds.new_ones(batch, length, dtype=torch.bool) if call.padding is None else call.padding[:, -length:]
        self.patch.prompts = self.patch.local.prompts = prefills(
            self.patch, images, self.patch.local.encoded, (real.sum(1) - self.patch.local.candidates).tolist()
        )
        prompt = choose(self.patch, images, embeds, call.visual, bound.get("deepstack_visual_embeds"), call.padding)
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
        if self.patch.positions == "reindex":
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
        if mask.ndim == 2 and call.past is not None and not self.patch.masks_first:
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
        labels = self.patch.local.labels
        if labels is None:
            return
        gone = ~keep & torch.stack(list(visual.values())).any(0)
        # Nothing predicts the first token that is kept, but the one before it would hold its own state.
        first = keep & (keep.cumsum(1) == 1)
        first[:, 1:] &= gone[:, :-1]
        labels[:, -keep.shape[1] :].masked_fill_(gone | first, -100)

    def leave(self, text: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook: it has ended. Its last hidden state gets the prompt's length back."""
        call, self.patch.local.call = self.patch.local.call, None
        inside, self.patch.local.inside = self.patch.local.inside, None
        follow(getattr(output, "past_key_values", None), None)
        if inside is not None and call is not None and call.visual is not None and output is not None:
            return self._behind_layers(inside, call, output)
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
        images = len(self.patch.seen)
        left = int((keep & inside.visual).sum())
        self.patch.seen = ((sum(size for size, _ in self.patch.seen) / images, left / images),)
        record_left(self.patch.local.prompts, inside)
        if inside.index.shape[1] < keep.shape[1]:
            output.last_hidden_state = spread(output.last_hidden_state, keep, inside.valid)
        return output


def _flat(index: Tensor, length: int) -> Tensor:
    return index + torch.arange(len(index), device=index.device)[:, None] * length
