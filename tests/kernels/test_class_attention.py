import pytest
import torch
from kernel_inputs import TOKENS, attention_inputs, error
from torch.utils.flop_counter import FlopCounterMode

from tokenprune import TokenPruneError
from tokenprune.kernels.class_attention import class_attention
from tokenprune.kernels.class_attention.reference import class_attention as naive


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rows", [0, -1, slice(0, 2), slice(None)], ids=str)
@pytest.mark.parametrize("contiguous", [False, True])
def test_the_rows_are_those_of_the_full_map(tokens: int, rows: int | slice, contiguous: bool) -> None:
    q, k, _ = attention_inputs(2, 3, tokens, 20)
    if contiguous:
        q, k = q.contiguous(), k.contiguous()
    full = torch.randn(1, 3, tokens, tokens)
    mask = (full > -1) | torch.eye(tokens, dtype=torch.bool)  # every query may attend to itself at least
    for bias in (None, full, full[:, :, :1], mask):
        got = class_attention(q, k, scale=0.2, bias=bias, rows=rows)
        torch.testing.assert_close(got, naive(q, k, scale=0.2, bias=bias, rows=rows), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    q, k, _ = (x.to(dtype) for x in attention_inputs(2, 3, 257, 64))
    exact = naive(q.double(), k.double())
    row = class_attention(q, k)
    assert row.dtype == torch.float32
    assert error(row, exact) <= 2 * error(naive(q, k), exact)


def test_groups_of_queries_share_a_key_head() -> None:
    q, k, _ = attention_inputs(2, 6, 40, 8)
    torch.testing.assert_close(class_attention(q, k[:, :3]), naive(q, k[:, :3].repeat_interleave(2, 1)))


def test_batch_mates_change_not_a_bit_and_nan_stays_in_its_image() -> None:
    q, k, _ = attention_inputs(5, 3, 197, 20)
    together = class_attention(q, k)
    for part in (slice(0, 1), slice(2, 5)):
        assert torch.equal(together[part], class_attention(q[part], k[part]))
    k[1, 2, 4, 0] = float("nan")
    spoilt = class_attention(q, k)
    assert spoilt[1, 2].isnan().all()
    assert torch.equal(spoilt[[0, 2, 3, 4]], together[[0, 2, 3, 4]])


@pytest.mark.parametrize("contiguous", [False, True])
def test_gradients_are_those_of_the_full_map(contiguous: bool) -> None:
    q, k, _ = (x.double() for x in attention_inputs(2, 3, 12, 8))
    if contiguous:
        q, k = q.contiguous(), k.contiguous()
    bias = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    leaves = [x.detach().requires_grad_() for x in (q, k, bias)]
    for rows in (0, slice(0, 2)):
        torch.autograd.gradcheck(lambda q, k, b, r=rows: class_attention(q, k, bias=b, rows=r), leaves)
        torch.autograd.gradcheck(lambda q, k, r=rows: class_attention(q, k[:, :1], rows=r), leaves[:2])


def test_the_operator_is_well_formed_and_counted() -> None:
    q, k, _ = (x.contiguous() for x in attention_inputs(2, 3, 33, 8))
    for training in (False, True):
        arguments = (q[:, :, :1].clone().requires_grad_(training), k.clone().requires_grad_(training), 0.3, "")
        torch.library.opcheck(torch.ops.tokenprune.few_logits.default, arguments)
    with FlopCounterMode(display=False) as counter:
        class_attention(q, k, rows=slice(0, 2))
    assert counter.get_total_flops() == 2 * 2 * 3 * 2 * 33 * 8


def test_autocast_does_not_round_the_logits() -> None:
    q, k, _ = attention_inputs(2, 3, 63, 16)
    expected = class_attention(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(class_attention(q, k), expected)


def test_what_cannot_be_is_refused() -> None:
    q = torch.ones(2, 3, 9, 4)
    with pytest.raises(TokenPruneError, match="do not fit"):
        class_attention(q, torch.ones(2, 3, 9, 5))
    with pytest.raises(TokenPruneError, match="'eager', 'triton'"):
        class_attention(q, q, backend="tiled")
    with pytest.raises(TokenPruneError, match="TRITON_INTERPRET"):
        class_attention(q, q, backend="triton")


def test_the_transforms_of_torch_func_go_through() -> None:
    q, k, _ = attention_inputs(2, 3, 9, 8)

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return class_attention(q, k).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, own in zip(torch.func.grad(loss, (0, 1))(q, k), expected, strict=True):
        torch.testing.assert_close(got, own)
    mapped = torch.func.vmap(class_attention)(q.unsqueeze(1), k.unsqueeze(1))
    torch.testing.assert_close(mapped[:, 0], class_attention(q, k))
