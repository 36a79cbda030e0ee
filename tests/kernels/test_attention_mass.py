import pytest
import torch

from tokenprune.kernels.attention_mass import attention_mass
from tokenprune.kernels.attention_mass.reference import attention_mass as naive
from tokenprune.kernels.class_attention import class_attention
from tokenprune.kernels.class_attention.reference import class_attention as naive_class_attention

SHAPES = [(2, 3, 1, 8), (1, 1, 63, 5), (3, 2, 97, 16), (2, 6, 257, 64)]


def case(batch: int, heads: int, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q = 2 * torch.randn(batch, heads, tokens, dim, generator=generator)
    k = 2 * torch.randn(batch, heads, tokens, dim, generator=generator)
    weights = torch.rand(batch, heads, tokens, generator=generator)
    return q, k, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("iterations", [1, 5, 30])
@pytest.mark.parametrize("memory_limit", [1, 2**18, 2**30])
def test_every_tiling_gives_the_formula(shape: tuple[int, ...], iterations: int, memory_limit: int) -> None:
    q, k, weights = case(*shape)
    mass = attention_mass(q, k, weights, iterations=iterations, memory_limit=memory_limit)
    torch.testing.assert_close(mass, naive(q, k, weights, iterations=iterations), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("rows", [1, 97])
def test_a_bias_is_added_to_the_logits_of_its_own_image_and_head(shape: tuple[int, int], rows: int) -> None:
    q, k, weights = case(2, 3, 97, 16)
    bias = torch.randn(*shape, rows, 97)
    for limit in (1, 2**30):
        mass = attention_mass(q, k, weights, iterations=2, bias=bias, memory_limit=limit)
        torch.testing.assert_close(mass, naive(q, k, weights, iterations=2, bias=bias), rtol=1e-4, atol=1e-6)


def test_a_worked_example() -> None:
    # One head, two tokens. q.k = [[0, log 3], [0, 0]] gives A = [[1/4, 3/4], [1/2, 1/2]]; from w = (1, 0) one step is
    # (1/4, 3/4), and the next (1/4*1/4 + 3/4*1/2, 1/4*3/4 + 3/4*1/2) = (7/16, 9/16).
    q = torch.tensor([[[[1.0], [0.0]]]])
    k = torch.tensor([[[[0.0], [3.0]]]]).log1p() * torch.tensor(3.0).log() / torch.tensor(4.0).log()
    weights = torch.tensor([[[1.0, 0.0]]])
    torch.testing.assert_close(attention_mass(q, k, weights, scale=1.0), torch.tensor([[[0.25, 0.75]]]))
    twice = attention_mass(q, k, weights, iterations=2, scale=1.0)
    torch.testing.assert_close(twice, torch.tensor([[[7 / 16, 9 / 16]]]))


def test_mass_is_preserved_and_low_precision_stays_near() -> None:
    q, k, weights = case(2, 6, 257, 64)
    mass = attention_mass(q, k, weights, iterations=30)
    torch.testing.assert_close(mass.sum(-1), weights.sum(-1), rtol=1e-4, atol=1e-5)
    low = attention_mass(q.bfloat16(), k.bfloat16(), weights, iterations=5)
    plain = naive(q.bfloat16(), k.bfloat16(), weights.bfloat16(), iterations=5).float()
    exact = naive(q, k, weights, iterations=5)
    assert (low - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_one_tile_stays_under_the_limit() -> None:
    q, k, weights = case(4, 6, 128, 16)
    biggest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    biggest = max(biggest, tensor.numel() * tensor.element_size())
            return out

    limit = 2**18
    import tokenprune.kernels.attention_mass.eager as eager

    with Largest():
        eager._attention_mass._init_fn(q, k, weights, None, 3, 0.25, limit)
    assert q.numel() * 4 <= biggest <= max(limit, q.numel() * 4)


def test_the_operator_is_well_formed_and_counted() -> None:
    q, k, weights = case(2, 3, 33, 8)
    torch.library.opcheck(torch.ops.tokenprune.attention_mass.default, (q, k, weights, None, 3, 0.3, 2**20))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        attention_mass(q, k, weights, iterations=5)
    assert counter.get_total_flops() == 2 * 2 * 3 * 33 * 33 * (8 + 5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_attention(shape: tuple[int, ...]) -> None:
    q, k, _ = case(*shape)
    bias = torch.randn(1, shape[1], shape[2], shape[2])
    for extra in (None, bias):
        row = class_attention(q, k, scale=0.2, bias=extra)
        torch.testing.assert_close(row, naive_class_attention(q, k, scale=0.2, bias=extra))
