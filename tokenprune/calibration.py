"""Calibration: a threshold from unlabelled images: each image keeps what it needs, the average meets a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.api import patched, report
from tokenprune.bisection import nearest_to
from tokenprune.budget import checked_count, checked_share
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import active_patches
from tokenprune.fixed_counts import fixed_counts
from tokenprune.patch import Patch
from tokenprune.registry import has_threshold, make_method, method_names, own_budget
from tokenprune.solver import shares_of
from tokenprune.stored_schedule import StoredSchedule

ADAPTIVE = {"tome": "adaptive_tome"}
"""What a method with a fixed number of tokens is with a threshold in its place."""

LARGEST = 0.9999
NEAR = 0.002
MET = 0.01
ROUNDS = 20


def calibrate(
    model: nn.Module,
    images: Tensor,
    method: str = "tome",
    *,
    flops: float,
    batch_size: int = 64,
    restore: str | None = None,
    **options: Any,
) -> StoredSchedule:
    """The threshold of an adaptive method at which the mean over `images` costs a share `flops` of the multiply-adds of
    `model`, which is left as it is; each image keeps as many tokens as it has that differ.

    images: [N, C, H, W] on the model's device, without labels. method: one with a threshold: "saint", "algm", or "tome"
    for "adaptive_tome". Of "ltmp", whose thresholds are learned (`weights=`, or the shipped ones), the number of tokens
    that they leave in the mean, as a schedule with the same number in every image, of "ltmp_fixed". batch_size: of the
    forwards. restore: as `patch` takes it. options: of the method. `patch(model, schedule=...)` takes what is returned;
    the report's FLOPs are then the mean over the images of the last forward, and its places say the fewest and the most
    tokens that left an image.

    Raises:
        UnsupportedMethod: the method has no threshold. UnsupportedModel: no image tower.
        BudgetError: the budget is malformed, or no threshold meets it within 1%.
        TokenPruneError: images are none.
    """
    name, aim = ADAPTIVE.get(method, method), checked_share("flops", flops)
    learns = name in method_names() and make_method(name, {}).learned is not None
    fixed = learns and f"{name}_fixed" in method_names()
    if not fixed and (not has_threshold(name) or "threshold" in options):
        known = ", ".join(["tome", *(one for one in method_names() if has_threshold(one))])
        raise UnsupportedMethod(f"calibrate finds the threshold of a method that has one, not {method!r}: {known}")
    make_method(name, {key: value for key, value in options.items() if key != "weights" or not learns})
    checked_images(images)
    checked_count("batch_size", batch_size, smallest=1, example=64)
    if fixed:
        with evaluating(model):
            return fixed_counts(model, images, name, flops=aim, batch_size=batch_size, restore=restore, **options)

    return threshold_at(Costs(model, images, name, batch_size, restore, options), aim)


class Costs:
    """What a method with a threshold costs on images in the mean, each threshold counted once.

    model, images, batch_size, restore, options: as `calibrate` takes them. name: of the method.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        name: str,
        batch_size: int,
        restore: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.images, self.options, self.restore = name, len(images), dict(options or {}), restore
        self._counted = lru_cache(maxsize=None)(
            lambda threshold: mean_flops(
                model, images, name, batch_size, {**self.options, "threshold": threshold, "restore": restore}
            )
        )

    def __call__(self, threshold: float) -> tuple[float, tuple[float, dict[int | str, float]]]:
        """(share of the multiply-adds, (threshold, of each place the share that may leave at most))."""
        ratio, most = self._counted(threshold)
        return ratio, (threshold, most)


def threshold_at(costs: Costs, flops: float, near: float = NEAR) -> StoredSchedule:
    """The threshold at which `costs` come to a share `flops`; an error of `near` is small enough.

    Raises:
        BudgetError: no threshold meets it within 1%.
    """
    ratio, (threshold, most) = nearest_to(
        flops, costs, -LARGEST, LARGEST, first=0.0, rising=True, near=near, rounds=ROUNDS
    )
    if abs(ratio - flops) > MET:
        raise BudgetError(
            f"flops={flops:g} is met by no threshold of {costs.name}: the nearest costs {ratio:.2f} in the mean over"
            f" {costs.images} images; use flops={ratio:.2f}, another method or more images"
        )
    found = {"goal": {"flops": flops}, "flops_ratio": ratio, "images": costs.images}
    kept = {key: value for key, value in costs.options.items() if key not in ("places", own_budget(costs.name))}
    return StoredSchedule(costs.name, most, {**kept, "threshold": threshold}, found, costs.restore)


def checked_images(images: object) -> Tensor:
    """`images` as [N, C, H, W], at least one.

    Raises:
        TokenPruneError: they are none.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise TokenPruneError(f"images must be one tensor [N, C, H, W], got {got}; for example torch.stack(images)")
    checked_count("images", len(images), smallest=1, example=64)
    return images


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode: dropout would blur what a threshold leaves, and statistics of batches would be moved."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def mean_flops(
    model: nn.Module, images: Tensor, method: str, batch_size: int, options: dict[str, Any]
) -> tuple[float, dict[int | str, float]]:
    """What the patched model costs in the mean over the images, and of each place the share that may leave at most.
    options: of `patch`."""
    with patched(model, method, **options), evaluating(model), torch.no_grad():
        found = [one for one in active_patches(model).values() if isinstance(one, Patch)]
        if len(found) != 1:
            raise UnsupportedModel(
                f"calibrate is of one image tower whose tokens leave for good, and {type(model).__name__} is none:"
                " where windows are passed through, patch(flops=...) meets a budget by itself and tokenprune.search"
                " finds a schedule"
            )
        total = 0.0
        for batch in torch.split(images, batch_size):
            model(batch)
            total += len(batch) * report(model).to_dict()["flops_ratio"]
        return total / len(images), shares_of(found[0].counts(found[0].tokens), found[0].tokens)
