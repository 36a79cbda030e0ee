"""The loss of a training that drops patches: over those that were kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.family import active_patches
from tokenprune.finding import modules_of


@dataclass(frozen=True, eq=False)
class KeptPatches:
    """The patches that one training forward kept.

    index: [B, K] positions among the `tokens` of each image, counted row by row. grid: (rows, columns) of those, None
    where they fill none.
    """

    index: Tensor
    tokens: int
    grid: tuple[int, int] | None

    def mask(self, x: Tensor) -> Tensor:
        """Where in x the kept patches are: [B, 1, H, W] of images [B, C, H, W], [B, N, 1] of tokens [B, N, C].

        Raises:
            TokenPruneError: x is of another batch, or it is not known where its patches are.
        """
        if x.shape[0] != self.index.shape[0]:
            raise TokenPruneError(
                f"a batch of {x.shape[0]}, and the last training forward was one of {self.index.shape[0]}; call"
                " kept_patches behind the forward that the loss is of"
            )
        kept = torch.zeros(x.shape[0], self.tokens, dtype=torch.bool, device=x.device)
        return spread(kept.scatter(1, self.index.to(x.device), True), self.grid, x)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the kept patches of each image: values [B, C, H, W] or [B, N, C] to [B].

        Raises:
            TokenPruneError: as `mask`.
        """
        share = self.index.shape[1] / self.tokens  # patches are of equal size
        return torch.where(self.mask(values), values, 0.0).flatten(1).mean(1) / share


def kept_patches(target: object) -> KeptPatches | None:
    """The patches that the last forward of `target` kept, a denoiser (or what holds one, such as a wrapper of DDP) that
    is trained under "deferred_masking". None where none are dropped: it is not patched so, or in eval mode.

    Of the last forward in this thread: keep what it gives where several forwards come before their losses.

    Raises:
        TokenPruneError: no training forward has been run since the patch.
        UnsupportedModel: `target` is neither a module nor a pipeline.
    """
    for module in modules_of(target):
        for name, patch in active_patches(module).items():
            if hasattr(patch, "kept"):
                found: KeptPatches | None = patch.kept(module.get_submodule(name))
                return found
    return None


def masked_mse(prediction: Tensor, target: Tensor, kept: KeptPatches | None) -> Tensor:
    """Mean squared error over the kept patches of each image, the mean over images, in fp32.

    prediction, target: [B, C, H, W] or [B, N, C]. kept: of `kept_patches`; None for all, as in the unmasked tuning.
    For losses with a weight for each image: `kept.mean(squared errors)` is [B].

    Raises:
        TokenPruneError: the shapes differ, or are not those of the forward.
    """
    if prediction.shape != target.shape:
        raise TokenPruneError(f"a prediction {list(prediction.shape)} has no error to a target {list(target.shape)}")
    prediction, target = prediction.float(), target.float()
    if kept is None:
        return functional.mse_loss(prediction, target)
    return kept.mean((prediction - target).square()).mean()


def spread(tokens: Tensor, grid: tuple[int, int] | None, x: Tensor) -> Tensor:
    """tokens [B, N], one value for each token, where these are in x: [B, 1, H, W] of images, [B, N, 1] of tokens.

    Raises:
        UnsupportedModel: it is not known where they are.
    """
    if x.ndim == 3 and x.shape[1] == tokens.shape[1]:
        return tokens.unsqueeze(-1)
    if x.ndim != 4 or grid is None or x.shape[2] % grid[0] or x.shape[3] % grid[1]:
        raise UnsupportedModel(f"it is not known where in {list(x.shape)} the {tokens.shape[1]} tokens are")
    high, wide = x.shape[2] // grid[0], x.shape[3] // grid[1]
    return tokens.view(-1, 1, *grid).repeat_interleave(high, 2).repeat_interleave(wide, 3)
