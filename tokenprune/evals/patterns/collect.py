"""What each patched model did with each image: where every patch ended, the class tokens, the answers."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.evals.accuracy_rows import classifies
from tokenprune.evals.arms import Arm, runnable
from tokenprune.evals.data import ImageData
from tokenprune.evals.fidelity import agreement, correct, observe
from tokenprune.evals.patterns.pattern import Pattern
from tokenprune.evals.progress import progress
from tokenprune.recording import Forward

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
"""What libraries call the parameter."""


def collect_patterns(
    arms: Sequence[Arm],
    images: ImageData,
    *,
    name: str = "",
    batch_size: int = 32,
    samples: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> list[Pattern]:
    """The patterns of those `arms` that have a model, the unpatched one first, each batch through all of them.

    The stages are the blocks L/4, L/2, 3L/4 and L - 1 of L, counted from 0: 3, 6, 9 and 11 of 12, as in the paper.

    Raises UnsupportedModel where no arm is patched, and for models whose tokens do not leave one by one;
    TokenPruneError for data with labels of which some are hidden.
    """
    base = arms[0].model
    assert base is not None
    parameter = next(base.parameters())
    parts: list[list[_Part]] = [[] for _ in arms]
    layout: _Layout | None = None
    chosen = len(images.chosen(samples, seed))
    loader = images.batches(batch_size, samples=samples, seed=seed)
    for batch, labels in progress(loader, "patterns", total=math.ceil(chosen / batch_size), show=show_progress):
        batch = batch.to(parameter.device, parameter.dtype)
        labels = None if images.dense else labels  # maps: told is on how much of them the answer stays
        layout = layout or _layout(arms, batch[:1])
        with torch.inference_mode():
            for arm, model, found in runnable(arms, parts):
                found.append(_observe(model, arm.is_patched, batch, layout))
        if labels is not None and int(labels.min()) < 0:
            raise TokenPruneError(f"{images.name} has images without a label; take a split whose labels are public")
        reference = parts[0][-1].logits
        for found in parts:
            if found:
                found[-1].judge(labels, reference)
    assert layout is not None, "data are not empty"
    return [
        Pattern(name, arm.method, arm.budget, arm.flops_ratio, layout.grid, layout.blocks, layout.stages, *_join(found))
        for arm, found in zip(arms, parts, strict=True)
        if found
    ]


@dataclass(frozen=True)
class _Layout:
    """parent: module whose children the blocks are. class_token: whether the first of a block's tokens is one."""

    parent: str
    blocks: int
    stages: tuple[int, ...]
    grid: tuple[int, int]
    class_token: bool
    classifies: bool


@dataclass
class _Part:
    """Of one batch; fields as in Pattern."""

    depth: Tensor
    groups: Tensor
    features: Tensor | None
    logits: Tensor | None
    right: Tensor | None = None

    def judge(self, labels: Tensor | None, reference: Tensor | None) -> None:
        """Compare the logits with the labels or the unpatched model's."""
        if self.logits is not None and reference is not None:
            self.right = agreement(self.logits, reference) if labels is None else correct(self.logits, labels)


def _layout(arms: Sequence[Arm], image: Tensor) -> _Layout:
    base = arms[0].model
    patched = [arm.model for arm in arms if arm.is_patched]
    if not patched or base is None:
        raise UnsupportedModel("; ".join(arm.note for arm in arms if arm.note) or "no method was given: nothing leaves")
    forward = next((found for model in patched if (found := _recorded(model, image)) is not None), None)
    if forward is None:
        raise TokenPruneError("every token stays at these budgets, so there are no patterns; use one below 1")
    where = type(base).__name__
    if not forward.places or forward.grid is None:
        raise UnsupportedModel(f"patterns are of the patches of an image on a grid, and those of {where} fill none")
    if any(place.grid is not None for place in forward.places):
        raise UnsupportedModel(
            f"patterns are of tokens that leave, and in {where} windows are passed through and come back; tokenprune"
            " viz draws which ones are computed"
        )
    parent, _, number = forward.places[0].name.rpartition(".")
    if not number.isdigit():
        raise UnsupportedModel(f"the blocks of {where} are not numbered ({forward.places[0].name}): no depth is known")
    blocks = len(list(_numbered(base, parent).children()))
    stages = tuple(dict.fromkeys((blocks // 4, blocks // 2, 3 * blocks // 4, blocks - 1)))
    with torch.inference_mode(), _Caught(base, parent, stages[:1]) as caught:
        base(image)
    rows, columns = forward.grid
    prefix = caught.outputs[0].shape[1] - rows * columns
    names = {name.rpartition(".")[2] for name, _ in base.named_parameters()}
    class_token = prefix > 0 and not names.isdisjoint(CLASS_TOKENS)
    return _Layout(parent, blocks, stages, forward.grid, class_token, classifies(base))


def _recorded(model: nn.Module | None, image: Tensor) -> Forward | None:
    assert model is not None
    with tokenprune.record(model) as recording, torch.inference_mode():
        model(image)
    return recording.forwards[-1] if recording.forwards else None


def _numbered(model: nn.Module, parent: str) -> nn.Module:
    """The blocks called `parent` within the tower, which is the model or in it."""
    for module in model.modules():
        with contextlib.suppress(AttributeError):
            return module.get_submodule(parent)
    raise UnsupportedModel(f"no module in {type(model).__name__} has blocks called {parent}: no depth is known")


class _Caught:
    """The outputs of some blocks, in order, in the with block."""

    def __init__(self, model: nn.Module, parent: str, blocks: Sequence[int]) -> None:
        children = list(_numbered(model, parent).children())
        self.outputs: list[Tensor] = []
        self.handles = [children[block].register_forward_hook(self._catch) for block in blocks]

    def _catch(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self.outputs.append(output)

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _observe(model: nn.Module, patched: bool, images: Tensor, layout: _Layout) -> _Part:
    forward: Forward | None = None
    with _Caught(model, layout.parent, layout.stages if layout.class_token else ()) as caught:
        if patched:
            with tokenprune.record(model) as recording:
                seen = observe(model, images)
            forward = recording.forwards[-1] if recording.forwards else None
        else:
            seen = observe(model, images)
    if any(len(output) != len(images) for output in caught.outputs):  # packed: whose class token is whose?
        return _cat([_observe(model, patched, image, layout) for image in torch.split(images, 1)])
    features = [output[:, 0].float().cpu() for output in caught.outputs]
    depth, groups = fates(forward, layout.stages, layout.blocks, len(images), math.prod(layout.grid))
    return _Part(
        depth,
        groups,
        torch.stack(features, 1) if features else None,
        seen.logits.float().cpu() if layout.classifies else None,
    )


def fates(
    forward: Forward | None, stages: Sequence[int], blocks: int, images: int, patches: int
) -> tuple[Tensor, Tensor]:
    """`depth` [I, N] and `groups` [I, S, N] of a Pattern from the record of its forward, None for all kept."""
    depth = torch.full((images, patches), blocks, dtype=torch.int16)
    source = torch.arange(patches).expand(images, -1)
    places = defaultdict(list)
    for place in forward.places if forward is not None else ():
        places[int(place.name.rpartition(".")[2])].append(place)
    groups = []
    for block in range(blocks):
        for place in places[block]:
            kept, source = place.kept.cpu(), place.source.cpu()
            stays = torch.zeros(images, patches + 1, dtype=torch.bool)
            stays.scatter_(1, torch.where(kept < 0, patches, kept), True)
            depth[(depth == blocks) & ~stays[:, :patches]] = block
        if block in stages:
            groups.append(source)
    return depth, torch.stack(groups, 1).to(torch.int16)


def _cat(parts: Sequence[_Part]) -> _Part:
    return _Part(
        torch.cat([part.depth for part in parts]),
        torch.cat([part.groups for part in parts]),
        _cat_known([part.features for part in parts]),
        _cat_known([part.logits for part in parts]),
        _cat_known([part.right for part in parts]),
    )


def _join(parts: Sequence[_Part]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    whole = _cat(parts)
    return whole.depth, whole.groups, whole.features, whole.right


def _cat_known(tensors: Sequence[Tensor | None]) -> Tensor | None:
    known = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(known) if known else None
