"""Gathering, merging and unmerging by index against the naive loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_inputs import TOKENS, error, groups
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tokenprune import TokenPruneError
from tokenprune.kernels.merge import gather, merge, merge_sizes, unmerge
from tokenprune.kernels.merge.reference import gather as naive_gather
from tokenprune.kernels.merge.reference import merge as naive_merge
from tokenprune.kernels.merge.reference import unmerge as naive_unmerge


@pytest.mark.parametrize("tokens", TOKENS)
def test_merging_is_the_formula(tokens: int) -> None:
    x, sizes, *indices = groups(2, tokens, 20)
    out, out_sizes = merge(x, *indices, sizes)
    expected, expected_sizes = naive_merge(x.double(), *indices, sizes.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out_sizes.double(), expected_sizes, rtol=1e-6, atol=0)
    assert torch.equal(merge_sizes(sizes, *indices), out_sizes)


def test_a_worked_example() -> None:
    # Tokens 0 to 3 hold 1, 2, 4 and 8 with sizes 1, 2, 1 and 4; 0 and 1 are merged into 3: (1*1 + 2*2 + 8*4) / 7.
    x, sizes = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]), torch.tensor([[1.0, 2.0, 1.0, 4.0]])
    kept, moved, target = torch.tensor([[2, 3]]), torch.tensor([[0, 1]]), torch.tensor([[1, 1]])
    out, out_sizes = merge(x, kept, moved, target, sizes)
    torch.testing.assert_close(out, torch.tensor([[[4.0], [37 / 7]]]))
    assert out_sizes.tolist() == [[1.0, 7.0]]
    torch.testing.assert_close(merge(x, kept, moved, target)[0], torch.tensor([[[4.0], [11 / 3]]]))
    assert unmerge(out, kept, moved, target)[0, :, 0].tolist() == [out[0, 1], out[0, 1], out[0, 0], out[0, 1]]


@pytest.mark.parametrize("tokens", TOKENS)
def test_unmerging_gives_every_token_its_group(tokens: int) -> None:
    x, _, *indices = groups(2, tokens, 20)
    merged, _ = merge(x, *indices)
    assert torch.equal(unmerge(merged, *indices), naive_unmerge(merged, *indices))


@pytest.mark.parametrize("shape", [(3, 9), (3, 9, 5), (1, 9, 5), (3, 9, 2, 4)], ids=str)
def test_gathering_picks_each_images_own(shape: tuple[int, ...]) -> None:
    x, index = torch.randn(shape), torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.long, torch.bool):
        one = (10 * x).to(dtype)
        assert torch.equal(gather(one, index), naive_gather(one.expand(3, *shape[1:]), index))


@pytest.mark.parametrize("shape", [(3, 2, 9, 5), (1, 2, 9, 5), (3, 1, 9, 9), (1, 2, 9, 9)], ids=str)
@pytest.mark.parametrize("dim", [2, 3])
def test_gathering_along_another_dimension(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape)
    index = torch.randint(0, shape[dim], (3, 4), generator=torch.Generator().manual_seed(0))
    for one in (x, x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(gather(one, index, dim=dim), naive_gather(x.expand(3, *shape[1:]), index, dim))


def test_several_tensors_at_once() -> None:
    x, sizes, kept, *_ = groups(2, 63, 20)
    got = gather((x, sizes, kept), kept.clamp(max=30))
    for one, table in zip(got, (x, sizes, kept), strict=True):
        assert torch.equal(one, gather(table, kept.clamp(max=30)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    x, sizes, *indices = groups(2, 257, 64)
    x = x.to(dtype)
    exact, _ = naive_merge(x.double(), *indices, sizes.double())
    plain, _ = naive_merge(x, *indices, sizes.to(dtype))
    out, out_sizes = merge(x, *indices, sizes)
    assert out.dtype == dtype
    assert out_sizes.dtype == torch.float32
    assert error(out, exact) <= 2 * error(plain, exact)


def test_sizes_beyond_what_bfloat16_counts() -> None:
    x = torch.ones(1, 600, 2, dtype=torch.bfloat16)
    indices = torch.zeros(1, 1, dtype=torch.long), torch.arange(1, 600)[None], torch.zeros(1, 599, dtype=torch.long)
    out, sizes = merge(x, *indices)
    assert torch.equal(out, torch.ones(1, 1, 2, dtype=torch.bfloat16))
    assert sizes.item() == 600


def test_batch_mates_change_not_a_bit_and_nan_stays_in_its_image() -> None:
    x, sizes, *indices = groups(5, 197, 20)
    together = merge(x, *indices, sizes)
    for part in (slice(0, 1), slice(2, 5)):
        alone = merge(x[part], *(i[part] for i in indices), sizes[part])
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one, all_of_them[part])
    x[1, indices[1][1, 0], 3] = float("nan")
    spoilt = merge(x, *indices, sizes)[0]
    where = indices[2][1, 0]
    assert spoilt[1].isnan().nonzero().tolist() == [[where, 3]]
    assert torch.equal(spoilt[[0, 2, 3, 4]], together[0][[0, 2, 3, 4]])
    back = unmerge(spoilt, *indices)
    assert back[1, :, 3].isnan().sum() == 1 + (indices[2][1] == where).sum()
    assert not back[[0, 2, 3, 4]].isnan().any()


def test_nothing_moves_and_no_images() -> None:
    x, sizes, *_ = groups(2, 9, 4)
    kept, none = torch.randperm(9).expand(2, -1), torch.empty(2, 0, dtype=torch.long)
    out, out_sizes = merge(x, kept, none, none, sizes)
    torch.testing.assert_close(out, gather(x, kept))
    assert torch.equal(out_sizes, gather(sizes, kept))
    out, out_sizes = merge(x[:0], kept[:0], none[:0], none[:0], sizes[:0])
    assert out.shape == (0, 9, 4)
    assert out_sizes.shape == (0, 9)
    assert gather(x, none).shape == (2, 0, 4)


def test_gradients() -> None:
    x, sizes, *indices = groups(2, 9, 3)
    leaves = [x.double().requires_grad_(), sizes.double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, sizes: merge(x, *indices, sizes), leaves)
    assert torch.autograd.gradgradcheck(lambda x, sizes: merge(x, *indices, sizes), leaves)
    merged = merge(*leaves[:1], *indices)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda merged: unmerge(merged, *indices), (merged,))
    repeated = torch.tensor([[1, 1, 0], [8, 2, 8]])
    assert torch.autograd.gradcheck(lambda x: gather(x, repeated), leaves[:1])


@pytest.mark.parametrize("training", [False, True])
def test_the_operator_is_well_formed(training: bool) -> None:
    x, sizes, *indices = groups(2, 9, 3)
    x, sizes = x.contiguous().requires_grad_(training), sizes.requires_grad_(training)
    torch.library.opcheck(torch.ops.tokenprune.merge.default, (x, *indices, sizes, ""))


def test_the_operators_own_gradient_is_that_of_plain_torch() -> None:
    x, sizes, *indices = groups(2, 30, 5)
    indices[1], indices[2] = indices[1][:, 2:], indices[2][:, 2:]  # two tokens are neither kept nor moved
    leaves = [x.double().requires_grad_(), sizes.double().requires_grad_()]
    weights = torch.randn(indices[0].shape[0], indices[0].shape[1], 5).double()

    def gradients(run: Any) -> tuple[Tensor, ...]:
        out, out_sizes = run()
        return torch.autograd.grad((out * weights).sum() + (out_sizes * weights[..., 0]).sum(), leaves)

    found = gradients(lambda: torch.ops.tokenprune.merge(leaves[0], *indices, leaves[1], ""))
    expected = gradients(lambda: merge(leaves[0], *indices, leaves[1]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_is_counted() -> None:
    x, sizes, *indices = groups(2, 63, 8)
    with FlopCounterMode(display=False) as counter:
        merge(x, *indices, sizes)
        torch.ops.tokenprune.merge(x, *indices, sizes, "")
    assert counter.get_total_flops() == 0


def test_meta_tensors_are_enough() -> None:
    x, sizes, *indices = (one.to("meta") for one in groups(2, 63, 8))
    out, out_sizes = merge(x, *indices, sizes)
    assert out.shape == (2, indices[0].shape[1], 8)
    assert out_sizes.shape == indices[0].shape
    assert unmerge(out, *indices).shape == x.shape
    out, out_sizes = torch.ops.tokenprune.merge(x, *indices, sizes, "")
    assert out.shape == (2, indices[0].shape[1], 8)
    assert torch.ops.tokenprune.gather(x, indices[0], 1).shape == out.shape


class Both(torch.nn.Module):
    def forward(self, x: Tensor, kept: Tensor, moved: Tensor, target: Tensor, sizes: Tensor) -> Tensor:
        merged, _ = merge(x, kept, moved, target, sizes)
        return unmerge(merged, kept, moved, target)


def test_one_graph_and_an_export_without_scatter_reduce() -> None:
    x, sizes, *indices = groups(2, 63, 8)
    inputs = (x, *indices, sizes)
    expected = Both()(*inputs)
    compiled = torch.compile(Both(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)
    exported = torch.export.export(Both(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), expected)
    for program in (exported, exported.run_decompositions()):
        names = [str(node.target) for node in program.graph.nodes]
        assert any("scatter_add" in name for name in names)
        assert not any("scatter_reduce" in name or "tokenprune" in name for name in names)


def test_what_cannot_be_is_refused() -> None:
    x, sizes, kept, moved, target = groups(2, 9, 3)
    with pytest.raises(TokenPruneError, match="do not fit along dimension 1"):
        gather(x, kept[:1])
    with pytest.raises(TokenPruneError, match="dimension 3"):
        gather(x, kept, dim=3)
    with pytest.raises(TokenPruneError, match="do not fit a batch of 2"):
        merge(x, kept, moved, target[:, 1:], sizes)
    with pytest.raises(TokenPruneError, match="'eager', 'triton'"):
        merge(x, kept, moved, target, sizes, backend="cuda")
    for run in (
        lambda: merge(x, kept, moved, target, sizes, backend="triton"),
        lambda: gather(x, kept, backend="triton"),
    ):
        with pytest.raises(TokenPruneError, match="TRITON_INTERPRET"):
            run()
