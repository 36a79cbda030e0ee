"""Merging and unmerging by drawn groups: against the loops, and each undone by the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cheap
from torch import Tensor

from tokenprune.kernels.merge import merge, unmerge
from tokenprune.kernels.merge.reference import merge as naive_merge
from tokenprune.kernels.merge.reference import unmerge as naive_unmerge
from tokenprune.reduction import Reduction


@dataclass(frozen=True)
class Groups:
    """x [B, n, C] with sizes [B, n], and which tokens are kept, moved and dropped."""

    x: Tensor
    sizes: Tensor
    kept: Tensor
    moved: Tensor
    target: Tensor

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.kept, self.moved, self.target


@st.composite
def groups(draw: st.DrawFn, drops: bool = False) -> Groups:
    batch, n, channels = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, n))
    moved = draw(st.integers(0, n - kept)) if drops else n - kept
    orders = torch.tensor([draw(st.permutations(range(n))) for _ in range(batch)])
    targets = [draw(st.lists(st.integers(0, kept - 1), min_size=moved, max_size=moved)) for _ in range(batch)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, n, channels, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (batch, n), generator=generator).double()
    target = torch.tensor(targets, dtype=torch.long).reshape(batch, moved)
    return Groups(x, sizes, orders[:, :kept], orders[:, kept : kept + moved], target)


@cheap
@given(groups())
def test_merge_and_unmerge_are_the_loops(drawn: Groups) -> None:
    merged, sizes = merge(drawn.x, *drawn.indices, drawn.sizes)
    expected, totals = naive_merge(drawn.x, *drawn.indices, drawn.sizes)
    torch.testing.assert_close(merged, expected)
    assert torch.equal(sizes, totals)
    assert torch.equal(unmerge(merged, *drawn.indices), naive_unmerge(expected.copy_(merged), *drawn.indices))


@cheap
@given(groups())
def test_merging_undoes_unmerging_and_keeps_the_sum(drawn: Groups) -> None:
    merged, sizes = merge(drawn.x, *drawn.indices, drawn.sizes)
    spread = unmerge(merged, *drawn.indices)
    torch.testing.assert_close(merge(spread, *drawn.indices, drawn.sizes)[0], merged)
    for tokens, weights in ((merged, sizes), (spread, drawn.sizes)):  # what all tokens hold together
        torch.testing.assert_close(
            (weights.unsqueeze(-1) * tokens).sum(1), (drawn.sizes.unsqueeze(-1) * drawn.x).sum(1)
        )


@cheap
@given(groups(drops=True))
def test_a_reduction_knows_where_each_token_went(drawn: Groups) -> None:
    reduction, entering = Reduction(*drawn.indices), drawn.x.shape[1]
    reduced, source = reduction(drawn.x, drawn.sizes), reduction.source(entering)
    assert reduced.shape[1] == reduction.tokens == drawn.kept.shape[1]
    assert torch.equal(source.gather(1, drawn.kept), torch.arange(drawn.kept.shape[1]).expand_as(drawn.kept))
    assert torch.equal(source.gather(1, drawn.moved), drawn.target)
    assert int((source < 0).sum()) == source.numel() - drawn.kept.numel() - drawn.moved.numel()
    assert torch.equal(reduction.merged_sizes(drawn.sizes).sum(1), (drawn.sizes * (source >= 0)).sum(1))
    assert torch.equal(reduction.follow(None), drawn.kept)
    same = reduction.bring_back(reduced, reduced, drawn.x)  # nothing was gained
    assert torch.equal(same, drawn.x)


@cheap
@given(groups(), st.integers(1, 3))
def test_tokens_in_front_and_copies_of_the_batch_change_nothing_else(drawn: Groups, count: int) -> None:
    reduction = Reduction(*drawn.indices)
    front = torch.randn(drawn.x.shape[0], count, drawn.x.shape[2], dtype=torch.float64)
    longer = reduction.with_prefix(count)(torch.cat([front, drawn.x], 1))
    assert torch.equal(longer[:, :count], front)
    assert torch.equal(longer[:, count:], reduction(drawn.x))
    tiled = reduction.tiled(count)(drawn.x.repeat(count, 1, 1))
    assert torch.equal(tiled, reduction(drawn.x).repeat(count, 1, 1))
