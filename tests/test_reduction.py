from dataclasses import replace

import pytest
import torch
from families import build, images
from torch import Tensor

import tokenprune
from tokenprune import registry
from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.merge import gather
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.restore import dropped
from tokenprune.schedule import Stages
from tokenprune.selection.facility import attend_within_tiles, facility_destinations
from tokenprune.selection.tiles import cut


def test_dropping_keeps_the_named_rows() -> None:
    x = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    kept = torch.tensor([[0, 3], [1, 2]])
    reduction = Reduction(kept)
    assert torch.equal(reduction(x), torch.stack([x[0, [0, 3]], x[1, [1, 2]]]))
    assert reduction.source(4).tolist() == [[0, -1, -1, 1], [-1, 0, 1, -1]]
    assert reduction.follow(torch.tensor([[7, 8, 9, 10], [7, 8, 9, 10]])).tolist() == [[7, 10], [8, 9]]


def test_merging_averages_by_size_worked_by_hand() -> None:
    # Tokens 0 to 3 hold 1, 2, 4 and 8 with sizes 1, 2, 1 and 4; 0 and 1 are merged into 3: (1*1 + 2*2 + 8*4) / 7.
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    sizes = torch.tensor([[1.0, 2.0, 1.0, 4.0]])
    reduction = Reduction(kept=torch.tensor([[2, 3]]), moved=torch.tensor([[0, 1]]), target=torch.tensor([[1, 1]]))
    torch.testing.assert_close(reduction(x, sizes), torch.tensor([[[4.0], [37 / 7]]]))
    assert reduction.merged_sizes(sizes).tolist() == [[1.0, 7.0]]
    assert reduction.source(4).tolist() == [[1, 1, 0, 1]]


def test_sizes_beyond_what_bfloat16_counts() -> None:
    x = torch.ones(1, 600, 2, dtype=torch.bfloat16)
    reduction = Reduction(
        kept=torch.zeros(1, 1, dtype=torch.long),
        moved=torch.arange(1, 600).unsqueeze(0),
        target=torch.zeros(1, 599, dtype=torch.long),
    )
    out = reduction(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.ones(1, 1, 2, dtype=torch.bfloat16))
    assert reduction.merged_sizes(torch.ones(1, 600)).item() == 600


def test_fusing_appends_the_weighted_sum() -> None:
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    reduction = Reduction(torch.tensor([[1]]), torch.tensor([[0, 2]]), weights=torch.tensor([[0.5, 0.25]]))
    assert reduction(x).tolist() == [[[2.0], [1.25]]]
    assert reduction.tokens == 2
    assert reduction.follow(torch.tensor([[4, 5, 6]])).tolist() == [[5, 4]]
    assert reduction.source(3).tolist() == [[1, 0, 1]]
    assert reduction.merged_sizes(torch.ones(1, 3)).tolist() == [[1.0, 2.0]]


def test_averages_worked_by_hand() -> None:
    # (3, 4) of size 3 takes (0, 10) and (1, 0); (6, 0) stays alone, and (9, 9) is dropped.
    x = torch.tensor([[[3.0, 4.0], [0.0, 10.0], [6.0, 0.0], [9.0, 9.0], [1.0, 0.0]]])
    sizes = torch.tensor([[3.0, 1.0, 5.0, 1.0, 1.0]])
    kept, moved, target = torch.tensor([[2, 0]]), torch.tensor([[1, 4]]), torch.tensor([[1, 1]])
    by_size, equal, norm = (Reduction(kept, moved, target, average=a)(x, sizes) for a in ("size", "equal", "norm"))
    torch.testing.assert_close(by_size, torch.tensor([[[6.0, 0.0], [2.0, 22 / 5]]]))
    torch.testing.assert_close(equal, torch.tensor([[[6.0, 0.0], [4 / 3, 14 / 3]]]))
    torch.testing.assert_close(norm, torch.tensor([[[6.0, 0.0], [20 / 23.36**0.5, 44 / 23.36**0.5]]]))
    assert torch.equal(norm[:, 0], x[:, 2])  # bit by bit
    torch.testing.assert_close(norm[0, 1].norm(), torch.tensor(10.0))


def test_shares_of_sizes_and_what_is_dropped() -> None:
    shares = torch.tensor([[0.5, 0.25]])
    kept, moved, target = torch.tensor([[2, 0]]), torch.tensor([[1, 4]]), torch.tensor([[1, 1]])
    reduction = Reduction(kept, moved, target, shares=shares)
    assert reduction.merged_sizes(torch.tensor([[3.0, 1.0, 5.0, 1.0, 2.0]])).tolist() == [[5.0, 4.0]]
    assert reduction.source(5).tolist() == [[1, 1, 0, -1, 1]]
    twice = reduction.tiled(2)
    assert twice.merged_sizes(torch.ones(2, 5)).tolist() == [[1.0, 1.75]] * 2
    assert dropped(reduction, 5).tolist() == [[3]]
    assert dropped(Reduction(kept), 5).tolist() == [[1, 3, 4]]


def test_a_dense_matrix_mixes() -> None:
    x = torch.randn(2, 3, 4)
    matrix = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).expand(2, -1, -1)
    reduction = Reduction(torch.empty(2, 0, dtype=torch.long), matrix=matrix)
    torch.testing.assert_close(reduction(x), torch.stack([x[:, :2].mean(1), x[:, 2]], 1))
    assert reduction.tokens == 2
    assert reduction.source(3).tolist() == [[0, 0, 1]] * 2


def test_merging_has_the_right_gradient() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.rand(2, 5, dtype=torch.float64) + 0.5
    reduction = Reduction(
        torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1, 4], [0, 2]]), torch.tensor([[1, 1], [0, 1]])
    )
    assert torch.autograd.gradcheck(lambda value: reduction(value, sizes), (x,))


def test_gathering_a_non_contiguous_slice() -> None:
    x = torch.randn(3, 7, 4)
    index = torch.tensor([[0, 5], [2, 1], [3, 3]])
    expected = torch.stack([row[1:][i] for row, i in zip(x, index, strict=True)])
    assert torch.equal(gather(x[:, 1:], index), expected)


@pytest.mark.parametrize("form", ["index", "groups", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_stays_in_front_bit_by_bit(form: str, dtype: torch.dtype) -> None:
    x = (100 * torch.randn(2, 3 + 5, 4)).to(dtype)
    sizes = torch.tensor([[1.0, 2.0, 1.0, 4.0, 3.0]]).expand(2, -1)
    moved, target = torch.tensor([[1, 3], [0, 4]]), torch.tensor([[2, 0], [1, 1]])
    reduction = {
        "index": Reduction(torch.tensor([[0, 2, 4], [3, 1, 2]])),
        "groups": Reduction(torch.tensor([[0, 2, 4], [1, 2, 3]]), moved, target),
        "fused": Reduction(torch.tensor([[0, 2, 4], [1, 2, 3]]), moved, weights=torch.rand(2, 2)),
    }[form]
    whole = reduction.with_prefix(3)(x, torch.cat([torch.ones(2, 3), sizes], 1))
    assert torch.equal(whole, torch.cat([x[:, :3], reduction(x[:, 3:], sizes)], 1))


def _tiled(*, as_matrix: bool = False, rate: float = 0.6) -> Method:
    """Tokens are shared out within four stretches of them; the blocks of the matrix, or all of it."""

    def select(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
        record = replace(record, hidden=record.hidden[:, record.num_prefix_tokens :], num_prefix_tokens=0)
        tiling = cut((1, record.tokens), keep, 4)
        reduction = attend_within_tiles(facility_destinations(record, tiling), record, 0.1, tiling)
        return Reduction(reduction.kept, matrix=reduction.dense) if as_matrix else reduction

    return Method(name="tiled", paper="a test", schedule=Stages(rate), select=select, merges=True)


@pytest.mark.parametrize("family", ["class_token", "map_pool"])
def test_a_matrix_of_tiles_is_a_matrix_at_a_place_of_a_tower(family: str) -> None:
    model = build(family)
    x, found = images(model), []
    registry.register_method("tiled")(_tiled)
    try:
        for as_matrix in (False, True):
            for restore in ("unmerge", "fusion"):
                tokenprune.patch(model, "tiled", schedule={1: 0.6}, as_matrix=as_matrix, restore=restore)
                with torch.no_grad():
                    found.append((model(x), model.forward_features(x)))
    finally:
        registry._METHODS.pop("tiled")
    for one, other in zip(found[:2], found[2:], strict=True):
        for part, whole in zip(one, other, strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0][1], found[1][1])
