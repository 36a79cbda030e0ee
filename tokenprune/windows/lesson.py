"""WindowLesson: one training forward of a method that learns which windows to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from tokenprune.windows.tiling import Grid, Tiling

Key = tuple[int, Tiling]


@dataclass
class WindowLesson:
    """Where a patch has one, all windows are computed, and of a masked one the tokens go on as they entered.

    marked: [B, H, W] the pixels that want to be computed. gains: [B, H, W] what the error falls by where all is
    computed, None where nobody has looked. counted: {block: share of its windows} -> what such a forward
    costs as a share of the unpatched one, scoring included. whole: whether none is masked yet. grids: of each stage.
    confidences: (stage, tiling) -> [B, W] logits of computing each window. alive: the same -> [B, W] masks, one and
    zero, with the gradient of what decided them. blocks: block -> by which of these it went.
    """

    marked: Tensor
    counted: Callable[[Mapping[int, Tensor]], Tensor]
    whole: bool = False
    gains: Tensor | None = None
    grids: dict[int, Grid] = field(default_factory=dict)
    confidences: dict[Key, Tensor] = field(default_factory=dict)
    alive: dict[Key, Tensor] = field(default_factory=dict)
    blocks: dict[int, Key] = field(default_factory=dict)

    def marked_windows(self, key: Key) -> Tensor:
        """[B, W] whether a window holds any of the marked pixels."""
        tokens = functional.adaptive_max_pool2d(self.marked[:, None].float(), self.grids[key[0]])
        return self._windows(key, tokens).amax(2) > 0

    def window_gains(self, key: Key) -> Tensor:
        """[B, W] the mean of `gains` in a window, its padding counted as zeros."""
        assert self.gains is not None
        tokens = functional.adaptive_avg_pool2d(self.gains[:, None], self.grids[key[0]])
        return self._windows(key, tokens).mean(2)

    def _windows(self, key: Key, tokens: Tensor) -> Tensor:
        """[B, 1, h, w] of the tokens of a grid as those of its windows, [B, W, T]."""
        index = key[1].index(self.grids[key[0]], tokens.device)
        return functional.pad(tokens.flatten(1), (0, 1))[:, index.flatten()].view(-1, *index.shape)

    def alive_before(self, key: Key) -> Tensor | None:
        """The masks of the last stage before that of `key` with the same windows of the same grid, None without one."""
        stage, tiling = key
        stages = [s for s, other in self.alive if s < stage and other == tiling and self.grids[s] == self.grids[stage]]
        return self.alive[max(stages), tiling] if stages else None

    def cost(self) -> Tensor:
        """What the forward costs with the windows that are masked left out, the mean over images, with gradients."""
        return self.counted({block: self.alive[key].mean() for block, key in self.blocks.items()})
