"""Counting with remembered shapes, against torch's own flop counter and the shapes that operators give without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.flop_count import FlopCount, MathAttention


def tensor(*size: int, device: str = "meta", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*size, device=device, dtype=dtype)


def attention(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (3, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def several(x: Tensor) -> list[Tensor]:
    return [*x.topk(3, -1), *x[0].T.split(2), x.transpose(1, 2).contiguous(), x.transpose(1, 2).relu()]


FORWARDS: dict[str, Callable[[Tensor], Tensor | list[Tensor]]] = {
    "linear": lambda x: F.linear(x, x[0]),
    "batched": lambda x: x @ x.transpose(1, 2),
    "attention": attention,
    "convolution": lambda x: F.conv1d(x, x.new_zeros(4, x.shape[1], 3)),
    "several": several,
    "in place": lambda x: (x @ x.transpose(1, 2)).add_(1).mul_(2),
    "einsum": lambda x: torch.einsum("bnc,bmc->bnm", x, x),
}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", FORWARDS)
def test_counts_and_shapes_are_those_of_torch(name: str, device: str) -> None:
    forward = FORWARDS[name]
    for size in ((2, 5, 6), (2, 7, 6), (2, 5, 6)):  # worked out, another, remembered
        x = tensor(*size, device=device)
        with FlopCounterMode(display=False) as theirs, torch.no_grad():
            expected = forward(x)
        with FlopCount() as ours, torch.no_grad():
            got = forward(x)
        assert ours.flops == theirs.get_total_flops()
        assert ours.multiply_adds == ours.flops // 2
        for one, other in zip([got] if isinstance(got, Tensor) else got, expected, strict=False):
            assert one.device.type == device
            if isinstance(expected, list):
                assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_equal_arguments_of_other_classes_are_told_apart() -> None:
    x = tensor(3, dtype=torch.int64)
    with FlopCount():
        assert [(x * factor).dtype for factor in (1, 1.0, True, 1)] == [
            torch.int64,
            torch.float32,
            torch.int64,
            x.dtype,
        ]
        assert (x / 2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (x / 2).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_values_are_those_of_the_operators_where_there_are_some() -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with FlopCount() as count:
        assert torch.equal(x @ x, torch.mm(x, x))
    assert count.flops == 2 * 2 * 4**3


def test_every_result_has_a_storage_of_its_own() -> None:
    x = tensor(2, 3)
    with FlopCount():
        one, other, view = x.relu(), x.relu(), x[:1]
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert view.untyped_storage()._cdata == x.untyped_storage()._cdata


def test_solving_is_counted() -> None:
    matrix, values = tensor(2, 5, 5), tensor(2, 5, 3)
    with FlopCount() as count:
        torch.cholesky_solve(values, torch.linalg.cholesky_ex(matrix)[0])
    assert count.flops == 2 * 5**3 // 3 + 2 * 2 * 5 * 3 * 5


def test_an_error_is_that_of_the_operator() -> None:
    with FlopCount(), pytest.raises(RuntimeError, match="reduction dim"):
        tensor(2, 3) @ tensor(2, 3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_a_model(name: str) -> None:
    with torch.device("meta"):
        model: nn.Module = zoo.timm.create_model(name, depth=2).eval()
    x = torch.empty(1, 3, 224, 224, device="meta")
    for _ in range(2):
        with FlopCount() as count, torch.no_grad():
            model(x)
        assert count.flops == zoo.count(model, x).get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("option", ["none", "causal", "mask", "boolean mask", "grouped", "scale"])
def test_attention_is_counted_in_this_thread_alone(option: str, device: str) -> None:
    keys = 10 if option == "causal" else 12
    q = torch.randn(2, 4, 10, 8, device=device)
    k = torch.randn(2, 2 if option == "grouped" else 4, keys, 8, device=device)
    mask = torch.randn(2, 1, 10, keys, device=device)
    options = {
        "none": {},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": mask},
        "boolean mask": {"attn_mask": mask > -1},
        "grouped": {"enable_gqa": True},
        "scale": {"scale": 0.3},
    }[option]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as expected:
        wanted = F.scaled_dot_product_attention(q, k, k, **options)
    with MathAttention(), FlopCounterMode(display=False) as counter:
        assert torch.backends.cuda.flash_sdp_enabled(), "the switch of all threads is as it was"
        found = F.scaled_dot_product_attention(q, k, k, **options)
    assert counter.get_total_flops() == expected.get_total_flops() > 0
    assert found.shape == wanted.shape
    if device == "cpu":
        torch.testing.assert_close(found, wanted)
