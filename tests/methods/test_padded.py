"""Methods that decide on images of several lengths at once decide as they do on each image alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import zoo
from torch import Tensor

import tokenprune
from tokenprune import registry
from tokenprune.attention_record import AttentionRecord
from tokenprune.family import active_patches
from tokenprune.learning import Shape
from tokenprune.method import Method
from tokenprune.methods.ltmp import Thresholds
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.registry import make_method, method_names
from tokenprune.schedule import Stages
from tokenprune.selection.pairs import surplus

LENGTHS = (1, 2, 3, 4, 7, 8, 12)
HEADS, DIM = 2, 5
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("adaptive_tome", {"threshold": threshold}) for threshold in (-0.9, -0.2, 0.0, 0.3, 0.99)),
    *(("saint", {"threshold": threshold, "neighbours": 2}) for threshold in (-0.5, -0.01, 0.0, 0.2, 0.8)),
    ("saint", {"threshold": -0.3, "neighbours": 1, "gamma": 2.0}),
    ("ats", {}),
    ("ltmp", {}),
]


def image(length: int, prefix: int, class_token: bool, generator: torch.Generator, sharp: float) -> AttentionRecord:
    """sharp: how large queries are."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parts = [drawn(1, HEADS, prefix + length, DIM) for _ in range(3)]
    return AttentionRecord(
        hidden=drawn(1, prefix + length, 4),
        origin=torch.arange(length)[None],
        num_prefix_tokens=prefix,
        place=2,
        depth=6,
        grid=None,
        has_class_token=class_token,
        queries=parts[0] * sharp,
        keys=parts[1],
        values=parts[2],
    )


def thresholds(merge: float, prune: float) -> Thresholds:
    found = Thresholds(Shape(width=4, place=2, depth=6)).requires_grad_(False)

    found.load_state_dict({"merge": torch.tensor(merge), "prune": torch.tensor(prune)})
    return found


def filled(x: Tensor, longest: int, dim: int) -> Tensor:
    """Behind its end the first of a row, as in a packed batch."""
    missing = longest - x.shape[dim]
    return torch.cat([x, x.narrow(dim, 0, 1).expand(*(missing if d == dim else -1 for d in range(x.ndim)))], dim)


def together(records: list[AttentionRecord]) -> AttentionRecord:
    prefix, longest = records[0].num_prefix_tokens, max(record.tokens for record in records)
    alive = torch.tensor([[float(j < record.tokens) for j in range(longest)] for record in records])
    outside = torch.zeros(len(records), prefix + longest)
    outside[:, prefix:].masked_fill_(alive == 0, float("-inf"))

    def stacked(name: str, dim: int, length: int) -> Tensor:
        return torch.cat([filled(getattr(record, name), length, dim) for record in records])

    return replace(
        records[0],
        hidden=stacked("hidden", 1, prefix + longest),
        origin=stacked("origin", 1, longest),
        queries=stacked("queries", 2, prefix + longest),
        keys=stacked("keys", 2, prefix + longest),
        values=stacked("values", 2, prefix + longest),
        bias=outside[:, None, None],
        alive=alive,
    )


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("prefix", "class_token"), [(1, True), (0, False), (2, True)])
@pytest.mark.parametrize("keep", [12, 6])
def test_an_image_among_longer_ones_is_reduced_as_alone(
    name: str, options: dict[str, Any], prefix: int, class_token: bool, keep: int
) -> None:
    method: Method = make_method(name, options)
    assert method.padded
    generator, numbers = torch.Generator().manual_seed(3), set[int]()
    for sharp in (1.0, 1.0, 3.0, 9.0, 27.0):
        records = [image(length, prefix, class_token, generator, sharp) for length in LENGTHS]
        if name == "ltmp":
            records = [replace(record, learned=thresholds(0.3, 0.12)) for record in records]
        targets = method.reduce_ragged(together(records), keep).target
        for record, target in zip(records, targets, strict=True):
            alone = method.reduce_ragged(record, keep).target[0]
            assert target[: record.tokens].tolist() == alone.tolist(), f"{record.tokens} tokens"
            numbers.add(len({token for token in alone.tolist() if token >= 0}))
    assert len(numbers) > 2


def test_every_method_that_says_so_is_here() -> None:
    said = {name for name in method_names() if make_method(name, {}).padded}
    assert said == {name for name, _ in CASES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_too_much_is_counted_whole_in_half_precision(dtype: torch.dtype) -> None:
    """Of numbers so large these hold every second one at most."""
    alive = torch.ones(2, 4097, dtype=dtype)
    alive[1, 2051:] = 0
    record = AttentionRecord(alive[..., None], torch.zeros(2, 4097).long(), 0, 0, 1, None, alive=alive)
    assert surplus(record, 2048).tolist() == [[2049], [3]]


@pytest.mark.parametrize("method", ["ats", "keeps_nothing"])
def test_images_of_which_a_training_forward_has_dropped_others(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary table for each image, in the order of the batch, as patch dropout leaves it; and of an image of which a
    method keeps nothing the first token stays."""
    monkeypatch.setitem(registry._METHODS, "keeps_nothing", keeps_nothing)
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4, "num_classes": 5}
    model = timm.create_model("vit_small_patch16_dinov3", patch_drop_rate=0.3, **shape).train()
    zoo.randomise(model, 0)
    x = torch.randn(6, 3, 20, 28, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7).view(6, 1, 1, 1)
    found = []
    for padded in (True, False):
        tokenprune.patch(model, method, schedule={0: 1.0, 1: 1.0, 2: 1.0})
        (patch,) = active_patches(model).values()
        patch.method = replace(patch.method, padded=padded)
        torch.manual_seed(0)
        with tokenprune.record(model) as recording:
            model(x)
        found.append([place.kept.tolist() for place in recording.forwards[0].places])
    assert found[0] == found[1]
    assert len({sum(token >= 0 for token in row) for row in found[0][0]}) > 1


def keeps_nothing() -> Method:
    """Of an image behind the first place; there a number of its own."""

    def select(scores: Tensor | None, record: AttentionRecord, keep: int) -> RaggedReduction:
        channel = record.hidden[:, record.num_prefix_tokens :, 0]
        kept = channel > channel.mean(1, keepdim=True)
        return keep_where(kept if record.place == 0 else torch.zeros_like(kept))

    return Method("keeps_nothing", "a test", Stages(1.0), select, adaptive=True, padded=True, needs=frozenset({"keys"}))
