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

    marked: [B, H, W] the pixels that want to be computed. counted: {block: share of its windows} -> what such a forward
    costs as a share of the unpatched one, scoring included. whole: whether none is masked yet. grids: of each stage.
    confidences: (stage, tiling) -> [B, W] logits of computing each window. alive: the same -> [B, W] masks, one and
    zero, with the gradient of what decided them. blocks: block -> by which of these it went.
    """

    marked: Tensor
    counted: Callable[[Mapping[int, Tensor]], Tensor]
    whole: bool = False
    grids: dict[int, Grid] = field(default_factory=dict)
    confidences: dict[Key, Tensor] = field(default_factory=dict)
    alive: dict[Key, Tensor] = field(default_factory=dict)
    blocks: dict[int, Key] = field(default_factory=dict)

    def marked_windows(self, key: Key) -> Tensor:
        """[B, W] whether a window holds any of the marked pixels."""
        stage, tiling = key
        grid = self.grids[stage]
        tokens = functional.adaptive_max_pool2d(self.marked[:, None].float(), grid).flatten(1)
        index = tiling.index(grid, tokens.device)
        each = functional.pad(tokens, (0, 1))[:, index.flatten()].view(-1, *index.shape)
        return each.amax(2) > 0

    def cost(self) -> Tensor:
        """What the forward costs with the windows that are masked left out, the mean over images, with gradients."""
        return self.counted({block: self.alive[key].mean() for block, key in self.blocks.items()})
