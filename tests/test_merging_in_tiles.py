"""A third party's dense merge, as one matrix or as the blocks of one, on hosts other than denoisers."""

from __future__ import annotations

from collections.abc import Iterator

import families
import pytest
import torch
import windows_zoo
from lvlm_zoo import build, prompt
from torch import Tensor

import tokenprune
from tokenprune import registry
from tokenprune.attention_record import AttentionRecord
from tokenprune.lvlm.recipe import AfterTower
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.schedule import Stages
from tokenprune.tile_matrix import TileMatrix

torch.set_num_threads(1)


def as_matrix(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Each leaving token an average of all, most of all of the one that it stands at."""
    kept = record.origin.new_tensor(range(0, 2 * keep, 2)).clamp(max=record.tokens - 1).expand(len(record.origin), -1)
    places = torch.arange(record.tokens, device=kept.device)
    return Reduction(kept, matrix=(-(kept.unsqueeze(-1) - places).abs().float()).softmax(-1))


def in_tiles(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """The same in a single tile."""
    found = as_matrix(scores, record, keep)
    assert found.matrix is not None
    rows, members = (torch.arange(size, device=found.kept.device) for size in found.matrix.shape[1:])
    return Reduction(found.kept, tiles=TileMatrix(found.matrix, members, members, rows, rows))


@pytest.fixture(autouse=True)
def _methods() -> Iterator[None]:
    for select in (as_matrix, in_tiles):

        def make(*, merges: bool = True, select=select) -> Method:  # type: ignore[no-untyped-def]
            return Method(
                select.__name__, "none", Stages(0.5), select=select, merges=merges, after_tower=AfterTower(select)
            )

        registry.register_method(select.__name__)(make)
    yield
    for select in (as_matrix, in_tiles):
        registry._METHODS.pop(select.__name__)


@pytest.mark.parametrize("restore", ["unmerge", "fusion"])
@pytest.mark.parametrize("family", ["class_token", "mean_pool"])
def test_of_an_image_tower(family: str, restore: str) -> None:
    model = families.build(family)
    x = families.images(model)
    found = []
    with torch.no_grad():
        for method in ("as_matrix", "in_tiles"):
            tokenprune.patch(model, method, schedule={1: 0.5}, restore=restore)
            found.append((model(x), model.forward_features(x)))
        data = tokenprune.report(model).to_dict()
        plain = tokenprune.unpatch(model)(x)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert (found[0][0] - plain).abs().max() > 1e-2
    assert [place["tokens_out"] for place in data["places"]] == [18]


def test_behind_the_tower_of_a_vision_language_model() -> None:
    model, example = build("llava"), prompt("llava")
    found = []
    with torch.no_grad():
        for method in ("as_matrix", "in_tiles"):
            tokenprune.patch(model, method, keep=0.5)
            found.append(model(**example.inputs).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["as_matrix", "in_tiles"])
def test_of_whole_windows(method: str) -> None:
    """Which are left out, and cannot be merged."""
    with pytest.raises(tokenprune.UnsupportedMethod, match="must drop the others"):
        tokenprune.patch(windows_zoo.build(), method, keep=0.5, merges=False)
