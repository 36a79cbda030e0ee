"""What is known of the images when the prompt that they belong to reaches the language model.

Generation encodes images before the prompt runs, a plain forward inside of it. Either way the tower's output object is
handed on, and carries an `Encoded` of each patch (models that share a tower have one each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModel
from tokenprune.lvlm.costs import Given, given
from tokenprune.lvlm.host import LvlmHost, Scored, TowerCall, patch_ones
from tokenprune.lvlm.looks import Tap, hook_layers, scores_of
from tokenprune.lvlm.record import record_of

if TYPE_CHECKING:
    from tokenprune.lvlm.patch import LvlmPatch

_ATTRIBUTE = "_tokenprune_encoded_"


@dataclass
class Encoded:
    """The images of one call of the tower.

    values: [tiles, patches, 1 + ..] of the patches: ones, scores and keys, those that the method needs, until they are
    lifted. merged: whether features were merged before the projector. images: the same for the placeholders of each
    image, [n, 1 + ..]; a separator's row is of zeros. grids: (rows, columns) of each. given: of the tower and the
    projector.
    """

    values: Tensor
    scored: bool
    images: list[Tensor] | None = None
    grids: Sequence[tuple[int, int] | None] = ()
    merged: bool = False
    given: list[Given] = field(default_factory=list)

    def take(self, image: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the placeholders of an image: whether each is of the image [n], scores [n] and keys [n, d] of those."""
        assert self.images is not None
        rows = self.images[image]
        own = rows[:, 0] > 0.5
        scores = rows[own, 1] if self.scored else None
        metric = rows[own, 1 + int(self.scored) :]
        return own, scores, metric if metric.shape[1] else None


def encoded_of(output: Any, key: str) -> Encoded | None:
    """What an output of the tower carries for the patch with this key."""
    return getattr(output, _ATTRIBUTE + key, None)


class TowerSite:
    """Hooks on the tower and on the layers of it that are scored; `scored` is the last of them."""

    def __init__(self, patch: LvlmPatch, host: LvlmHost, scored: Scored | None) -> None:
        self.patch = patch
        self.arguments = patch.names.tower
        self.records = scored.records if scored is not None else None
        self.index = scored.index if scored is not None else 0
        self.lift, self.tiles, self.grid = host.lift, host.tiles, host.grid
        self.taps: list[Tap] = []

    def attach(self, host: LvlmHost, scored: Sequence[Scored]) -> None:
        """Put the hooks on the tower, the one behind it innermost."""
        host.tower.register_forward_pre_hook(self.enter, with_kwargs=True)
        host.tower.register_forward_hook(self.leave, with_kwargs=True, prepend=True)
        self.taps = hook_layers(self.patch, host.tower, scored)

    def enter(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: the tower starts."""
        for tap in self.taps:
            tap.follow(tower)
        local = self.patch.local
        local.bound = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        local.caught, local.scores = {}, []
        local.given = given(args, kwargs)

    def leave(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook: it has ended."""
        local = self.patch.local
        call = TowerCall(local.bound, output, local.caught.get(self.index, {}))
        before = local.scores or []
        local.bound, local.caught, local.scores = {}, {}, None
        tiles, patches = self.tiles(call)
        values = [patch_ones(tiles, patches, output.last_hidden_state)]
        scored = self.patch.after is not None and self.patch.after.score is not None
        key = self.patch.local.given.shapes
        if self.records is not None:
            find = self.records

            def look() -> list[Tensor]:
                return self._values(find(call), before, tiles, patches)

            with torch.no_grad():
                values += self.patch.spent.choosing(("score", key, self.index), look)
        encoded = Encoded(torch.cat(values, -1), scored, given=[self.patch.local.given])
        if self.lift is not None:
            encoded.images = self.lift(encoded.values, call)
            encoded.grids = [
                self.grid(int((image[:, 0] > 0.5).sum()), place, call) for place, image in enumerate(encoded.images)
            ]
        if isinstance(output, dict):  # an item: hooks that move outputs between devices rebuild them from their items
            output[_ATTRIBUTE + self.patch.key] = encoded
        else:
            setattr(output, _ATTRIBUTE + self.patch.key, encoded)
        self.patch.local.latest = encoded
        if self.patch.local.call is not None:  # else it is found again by the output
            self.patch.local.encoded.append(encoded)

    def _values(self, records: Sequence[Any], before: Sequence[Tensor], tiles: int, patches: int) -> list[Tensor]:
        after, found = self.patch.after, []
        assert after is not None
        lengths = [record.tokens for record in records]
        if any(length != lengths[0] for length in lengths) and patches != sum(lengths):
            raise UnsupportedModel("the tower's tiles have different numbers of patches")
        looked_at = [sum(r.tokens * r.hidden.shape[0] for r in records), *map(len, before)]
        if any(tokens != tiles * patches for tokens in looked_at):
            raise UnsupportedModel(
                "the image tower is patched itself, and the layer that is scored has fewer tokens than the images have"
                " patches; unpatch the tower, or use a method that does not look at its attention, such as 'uniform'"
            )
        if after.score is not None:
            last = scores_of(after, records)
            found.append(torch.stack([*(one.to(last.device) for one in before), last]).mean(0))
        if after.keys is not None:
            found.append(torch.cat([after.keys(record).flatten(0, 1).float() for record in records]))
        return [value.view(-1, patches, value.shape[-1]) for value in found]


class ProjectorSite:
    """A hook in front of the projector. What a method merges, it merges there, where a patch is a token."""

    def __init__(self, patch: LvlmPatch, merges: bool) -> None:
        self.patch = patch
        self.merges = merges

    def enter(self, projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: the features of all images are projected; merged ones [T, n, C] take the places that they keep."""
        encoded, after = self.patch.local.latest, self.patch.after
        if encoded is None:
            return None
        encoded.given.append(given(args, kwargs))
        if not self.merges:
            return None
        features: Tensor = args[0]
        assert encoded.images is not None
        assert after is not None
        merged = []
        for place, x in enumerate(features):
            own, scores, metric = encoded.take(place)
            assert metric is not None
            patches, where = x[own], own.nonzero().squeeze(1)
            record = record_of(patches.detach().unsqueeze(0), encoded.grids[place], metric.unsqueeze(0))
            scored = scores.unsqueeze(0) if scores is not None else None
            with torch.no_grad():
                reduction = after.select(scored, record, self.patch.count_alone(scores, len(patches)))
            merged.append(x.index_copy(0, where[reduction.kept[0]], reduction(patches.unsqueeze(0))[0]))
        encoded.merged = True
        return (torch.stack(merged), *args[1:]), kwargs


def pack_here(model: nn.Module, pack: Any, features: Sequence[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
    """Pack features as `pack(features, *args, **kwargs)` does, and in the same way what is known of their patches.

    Called by the class that stands for `model`'s where a patch is on it.
    """
    packed = pack(features, *args, **kwargs)
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    patch: LvlmPatch = next(owner for owner in owners if hasattr(owner, "local"))  # type: ignore[assignment]
    encoded = patch.local.latest
    assert encoded is not None
    values = torch.split(encoded.values, [len(tiles) for tiles in features])
    separator = {"image_newline": encoded.values.new_zeros(encoded.values.shape[-1])}
    encoded.images = pack(values, *args, **{**kwargs, **separator})[0]
    encoded.grids = [None] * len(values)
    return packed
