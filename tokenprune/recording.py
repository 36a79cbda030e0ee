"""Recording: which original token went where, for each forward inside `tokenprune.record`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class PlaceRecord:
    """What one place did in one forward.

    name: of the place. kept: [B, K] original patch of each leaving token (of a group: the token merged into; of a
    fused token: its heaviest member). source: [B, N0] for each original patch the position among the K leaving tokens
    that represents it, -1 where it was dropped. sizes: [B, K] original patches in each, or None (one each). grid:
    (rows, columns) of the tokens that enter a place of a denoiser or of a model of windows, whose levels have their
    own; None where they fill none, and of other image towers. In a model of windows the last of kept are -1 in an image
    of which fewer tokens are computed than of another.
    """

    name: str
    kept: Tensor
    source: Tensor
    sizes: Tensor | None
    grid: tuple[int, int] | None = None


@dataclass
class Forward:
    """One forward: grid is (rows, columns) of original patches, None where they fill none (the host dropped some, or
    was given patches instead of images).

    Of a denoiser: one call of one step. timestep: as the model was given it. grid: of the latents, None where they have
    none. places: stacks, or blocks where the method runs parts of each on a choice of its own, that compute fewer
    tokens in this forward; they restore the others, so that each counts from all of them.
    """

    grid: tuple[int, int] | None
    places: list[PlaceRecord] = field(default_factory=list)
    timestep: float | None = None


@dataclass(eq=False)
class Recording:
    """The forwards of one `record` block, in order."""

    forwards: list[Forward] = field(default_factory=list)
