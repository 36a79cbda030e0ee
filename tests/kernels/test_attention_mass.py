import pytest
import torch
from kernel_inputs import TOKENS, attention_inputs, error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tokenprune import TokenPruneError
from tokenprune.kernels.attention_mass import attention_mass, choose, eager, mass_and_log_sums
from tokenprune.kernels.attention_mass.reference import attention_mass as naive
from tokenprune.kernels.attention_mass.tiles import tiles

PATHS = ["tiled", "matrix_free"]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cached", [2**13, 2**18, 2**21])
def test_every_tiling_gives_the_formula(tokens: int, path: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CACHED", cached)
    q, k, weights = attention_inputs(3, 2, tokens, 20)
    expected = naive(q, k, weights, iterations=3)
    for limit in (1, 2**19, 2**30):
        mass = attention_mass(q, k, weights, iterations=3, memory_limit=limit, backend=path)
        torch.testing.assert_close(mass, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 5, 30])
def test_what_the_dispatcher_takes_gives_the_formula(iterations: int) -> None:
    q, k, weights = attention_inputs(2, 6, 257, 64)
    expected = naive(q, k, weights, iterations=iterations)
    torch.testing.assert_close(attention_mass(q, k, weights, iterations=iterations), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype, path: str) -> None:
    q, k, weights = (x.to(dtype) for x in attention_inputs(2, 3, 257, 64))
    exact = naive(q.double(), k.double(), weights.double(), iterations=5)
    mass = attention_mass(q, k, weights, iterations=5, backend=path)
    assert mass.dtype == torch.float32
    assert error(mass, exact) <= 2 * error(naive(q, k, weights, iterations=5), exact)


def test_double_precision_stays() -> None:
    q, k, weights = (x.double() for x in attention_inputs(1, 2, 63, 8))
    for path in PATHS:
        mass = attention_mass(q, k, weights, iterations=2, backend=path)
        torch.testing.assert_close(mass, naive(q, k, weights, iterations=2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("rows", [1, 97])
@pytest.mark.parametrize("mask", [False, True])
def test_a_bias_is_added_to_the_logits_of_its_own_image_and_head(
    shape: tuple[int, int], rows: int, mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, weights = attention_inputs(2, 3, 97, 16)
    bias = torch.randn(*shape, rows, 97, generator=torch.Generator().manual_seed(rows))
    if mask:
        bias = bias > 0.5
    expected = naive(q, k, weights, iterations=2, bias=bias)
    for cached in (2**11, 2**14, 2**21):
        monkeypatch.setattr(eager, "CACHED", cached)
        for path in PATHS:
            mass = attention_mass(q, k, weights, iterations=2, bias=bias, backend=path)
            torch.testing.assert_close(mass, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_padded_tokens_change_nothing(path: str) -> None:
    q, k, weights = attention_inputs(2, 3, 97, 16)
    real = torch.ones(2, 1, 1, 97, dtype=torch.bool)
    real[0, ..., 60:] = False
    weights = weights * real[:, 0]
    mass = attention_mass(q, k, weights, iterations=4, bias=real, backend=path)
    alone = attention_mass(q[:1, :, :60], k[:1, :, :60], weights[:1, :, :60], iterations=4, backend=path)
    torch.testing.assert_close(mass[:1, :, :60], alone, rtol=1e-5, atol=1e-7)
    assert (mass[0, :, 60:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_query_that_may_attend_to_nothing_pays_nothing(path: str, rows: int) -> None:
    q, k, weights = attention_inputs(2, 2, 40, 8)
    mask = torch.ones(2, 1, rows, 40, dtype=torch.bool)
    mask[0, :, 0] = False
    mass = attention_mass(q, k, weights, iterations=2, bias=mask, backend=path)
    torch.testing.assert_close(mass, naive(q, k, weights, iterations=2, bias=mask), rtol=1e-4, atol=1e-6)
    if rows == 1:
        assert (mass[0] == 0).all()


@pytest.mark.parametrize("cached", [2**13, 2**21])
def test_some_queries_push_for_themselves(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CACHED", cached)
    q, k, weights = attention_inputs(2, 3, 97, 16)
    bias = torch.randn(1, 3, 97, 97)
    few = (q[:, :, 5:50], k, weights[:, :, 5:50])
    torch.testing.assert_close(attention_mass(*few), naive(*few), rtol=1e-4, atol=1e-6)
    got = attention_mass(*few, bias=bias[:, :, 5:50])
    torch.testing.assert_close(got, naive(*few, bias=bias[:, :, 5:50]), rtol=1e-4, atol=1e-6)


def test_groups_of_queries_share_a_key_head() -> None:
    q, k, weights = attention_inputs(2, 6, 40, 8)
    got = attention_mass(q, k[:, :3], weights, iterations=2)
    expected = naive(q, k[:, :3].repeat_interleave(2, 1), weights, iterations=2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_worked_example() -> None:
    # One head, two tokens. q.k = [[0, log 3], [0, 0]] gives A = [[1/4, 3/4], [1/2, 1/2]]; from w = (1, 0) one step is
    # (1/4, 3/4), and the next (1/4*1/4 + 3/4*1/2, 1/4*3/4 + 3/4*1/2) = (7/16, 9/16).
    q = torch.tensor([[[[1.0], [0.0]]]])
    k = torch.tensor([[[[0.0], [3.0]]]]).log1p() * torch.tensor(3.0).log() / torch.tensor(4.0).log()
    weights = torch.tensor([[[1.0, 0.0]]])
    torch.testing.assert_close(attention_mass(q, k, weights, scale=1.0), torch.tensor([[[0.25, 0.75]]]))
    twice = attention_mass(q, k, weights, iterations=2, scale=1.0)
    torch.testing.assert_close(twice, torch.tensor([[[7 / 16, 9 / 16]]]))


@pytest.mark.parametrize("path", PATHS)
def test_several_counts_are_several_runs(path: str) -> None:
    q, k, weights = attention_inputs(2, 3, 63, 16)
    both = attention_mass(q, k, weights, iterations=(1, 7), backend=path)
    assert both.shape == (2, 2, 3, 63)
    for mass, count in zip(both, (1, 7), strict=True):
        assert torch.equal(mass, attention_mass(q, k, weights, iterations=count, backend=path))


@pytest.mark.parametrize("path", PATHS)
def test_a_tolerance_ends_where_the_mass_has_settled(path: str) -> None:
    q, k, weights = attention_inputs(2, 3, 63, 16)
    q[1] = q[1] / 2  # an image that settles sooner
    mass = attention_mass(q, k, weights, iterations=1e-3, backend=path)
    for image in range(2):
        for head in range(3):
            one = [x[image : image + 1, head : head + 1] for x in (q, k, weights)]
            before, count = one[2], 1
            while (after := naive(*one, iterations=count)).sub(before).abs().sum() >= 1e-3:
                before, count = after, count + 1
            assert count > 2
            torch.testing.assert_close(mass[image, head], after[0, 0], rtol=1e-4, atol=1e-6)


def test_mass_is_preserved() -> None:
    q, k, weights = attention_inputs(2, 6, 257, 64)
    mass = attention_mass(q, k, weights, iterations=30)
    torch.testing.assert_close(mass.sum(-1), weights.sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [37, 63, 197, 257])
@pytest.mark.parametrize("path", PATHS)
def test_batch_mates_change_not_a_bit(tokens: int, path: str) -> None:
    q, k, weights = attention_inputs(11, 3, tokens, 20)
    for iterations in (1, 3, 1e-3):
        together = attention_mass(q, k, weights, iterations=iterations, backend=path)
        for part in (slice(0, 1), slice(3, 8), slice(10, 11)):
            alone = attention_mass(q[part], k[part], weights[part], iterations=iterations, backend=path)
            assert torch.equal(together[part], alone)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("iterations", [2, 1e-3])
def test_nan_stays_in_its_image(path: str, iterations: float) -> None:
    q, k, weights = attention_inputs(3, 2, 63, 16)
    expected = attention_mass(q, k, weights, iterations=iterations, backend=path)
    q[1, 0, 5, 3] = float("nan")
    mass = attention_mass(q, k, weights, iterations=iterations, backend=path)
    assert mass[1, 0].isnan().all()
    assert torch.equal(mass[[0, 2]], expected[[0, 2]])


def test_an_empty_batch_has_no_mass() -> None:
    q, k, weights = attention_inputs(1, 2, 9, 4)
    for path in PATHS:
        assert attention_mass(q[:0], k[:0], weights[:0], iterations=2, backend=path).shape == (0, 2, 9)


class Allocated(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("path", PATHS)
def test_the_limit_is_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CACHED", 2**30)
    q, k, weights = (x.contiguous() for x in attention_inputs(2, 3, 512, 2))  # one map takes 1 MiB
    run = eager.tiled if path == "tiled" else eager.matrix_free
    for limit in (2**20, 3 * 2**20, 4 * 2**20):
        with Allocated() as mode:
            run(q, k, weights, None, [3], 0.0, 0.25, limit)
        assert limit // 2 <= mode.largest <= limit


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cached", [2**12, 2**21])
@pytest.mark.parametrize("iterations", [1, 3, [1, 2]])
def test_log_sums_are_those_of_the_logits(
    path: str, cached: int, iterations: int | list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "CACHED", cached)
    q, k, weights = attention_inputs(3, 2, 37, 20)
    bias = torch.randn(1, 2, 37, 37)
    bias[:, :, 5] = float("-inf")
    for added in (None, bias):
        mass, log_sums = mass_and_log_sums(q, k, weights, iterations=iterations, scale=0.9, bias=added, backend=path)
        assert torch.equal(
            mass, attention_mass(q, k, weights, iterations=iterations, scale=0.9, bias=added, backend=path)
        )
        logits = 0.9 * q.double() @ k.double().transpose(2, 3) + (0.0 if added is None else added)
        expected = logits.logsumexp(-1).float()
        expected[expected == float("-inf")] = float("inf")
        torch.testing.assert_close(log_sums, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("largest", [0.5, 61.0, 63.0, 700.0])
def test_logits_of_any_size_in_a_map_that_exceeds_the_cache(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are exponentiated as they are. One key points where the longest query does, and away from it."""
    monkeypatch.setattr(eager, "CACHED", 2**12)
    q, k, weights = attention_inputs(1, 2, 37, 20)
    k[:, :, 3], k[:, :, 4] = 3 * q[:, :, 7], -3 * q[:, :, 7]
    q[:, :, 7] *= 5
    longest = (q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1)).amax()
    scale = largest / float(longest)
    quick = next(iter(tiles(q, k, None, scale, 2, 48, q.dtype))).exponentials()
    assert (quick is not None) == (largest < 62)
    mass, log_sums = mass_and_log_sums(q, k, weights, iterations=2, scale=scale, backend="matrix_free")
    logits = scale * q.double() @ k.double().transpose(2, 3)
    torch.testing.assert_close(log_sums, logits.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)
    attention, expected = logits.softmax(-1), weights.double().unsqueeze(2)
    for _ in range(2):
        expected = expected @ attention
    torch.testing.assert_close(mass, expected.squeeze(2).float(), rtol=1e-4, atol=1e-6)
    louder = torch.cat([q, 100 * q]), k.repeat(2, 1, 1, 1), weights.repeat(2, 1, 1)
    assert torch.equal(attention_mass(*louder, iterations=2, scale=scale, backend="matrix_free")[:1], mass)


@pytest.mark.parametrize("largest", [61.0, 74.0])
def test_small_weights_count_where_all_logits_are_large(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight over the sum of a row's exponentials is no denormal number, which some users set to be 0."""
    monkeypatch.setattr(eager, "CACHED", 2**12)
    q, k, weights = attention_inputs(1, 2, 512, 16)
    q, k = (torch.nn.functional.normalize(x * 0.02 + 1, dim=-1) for x in (q, k))
    weights = weights * 1e-3
    torch.set_flush_denormal(True)
    try:
        mass = attention_mass(q, k, weights, scale=largest, backend="matrix_free")
    finally:
        torch.set_flush_denormal(False)
    expected = weights.double().unsqueeze(2) @ (largest * q.double() @ k.double().transpose(2, 3)).softmax(-1)
    torch.testing.assert_close(mass, expected.squeeze(2).float(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("training", [False, True])
def test_the_operator_is_well_formed(training: bool) -> None:
    q, k, weights = attention_inputs(2, 3, 33, 8)
    q = q.contiguous().requires_grad_(training)
    torch.library.opcheck(
        torch.ops.tokenprune.attention_mass.default,
        (q.detach(), k.contiguous(), weights, None, [1, 3], 0.0, 0.3, 2**20, "", training),
    )
    assert not attention_mass(q, k, weights).requires_grad


@pytest.mark.parametrize(("iterations", "maps"), [(1, 1), (5, 1)])
def test_multiply_adds_are_counted(iterations: int, maps: int) -> None:
    q, k, weights = attention_inputs(2, 3, 33, 8)
    with FlopCounterMode(display=False) as counter:
        attention_mass(q, k, weights, iterations=iterations)
    assert counter.get_total_flops() == 2 * 2 * 3 * 33 * 33 * (8 * maps + iterations)
    with FlopCounterMode(display=False) as counter:
        attention_mass(q, k, weights, iterations=iterations, memory_limit=1)  # every map is computed again
    assert counter.get_total_flops() == 2 * 2 * 3 * 33 * 33 * (8 + 1) * iterations


def test_autocast_does_not_round_the_map() -> None:
    q, k, weights = attention_inputs(2, 3, 63, 16)
    for path in PATHS:
        expected = attention_mass(q, k, weights, iterations=3, backend=path)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention_mass(q, k, weights, iterations=3, backend=path), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(2, 3, 8)}, "do not fit"),
        ({"k": torch.ones(2, 3, 9, 5)}, "do not fit"),
        ({"iterations": 0}, "at least one"),
        ({"iterations": 0.0}, "above 0"),
        ({"iterations": -1e-3}, "above 0"),
        ({"iterations": (3, 1)}, "rising"),
        ({"q": torch.ones(2, 3, 4, 4), "weights": torch.ones(2, 3, 4), "iterations": 2}, "use one"),
        ({"bias": torch.ones(2, 3, 9, 8)}, "does not fit"),
        ({"bias": torch.ones(9, 9)}, "does not fit"),
        ({"backend": "cuda"}, "'tiled', 'matrix_free', 'eager', 'triton'"),
        ({"backend": "triton"}, "TRITON_INTERPRET"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else value,
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    inputs: dict[str, object] = {
        "q": torch.ones(2, 3, 9, 4),
        "k": torch.ones(2, 3, 9, 4),
        "weights": torch.ones(2, 3, 9),
    }
    with pytest.raises(TokenPruneError, match=message):
        attention_mass(**{**inputs, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["tiled", "matrix_free"])
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_without_queries_or_keys_nobody_is_paid(path: str, rows: int, keys: int) -> None:
    q, k = torch.zeros(2, 3, rows, 4), torch.zeros(2, 3, keys, 4)
    mass, sums = mass_and_log_sums(q, k, torch.ones(2, 3, rows), backend=path)
    assert torch.equal(mass, torch.zeros(2, 3, keys))
    assert torch.equal(sums, torch.full((2, 3, rows), float("inf")))


def test_a_negative_scale_may_make_logits_large_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CACHED", 4096)  # a map that exceeds the cache
    q, k, weights = attention_inputs(1, 2, 63, 20)
    got = attention_mass(20 * q, 20 * k, weights, scale=-1.0, backend="matrix_free")
    expected = naive((20 * q).double(), (20 * k).double(), weights.double(), scale=-1.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "iterations", "path"),
    [(64, 1, "tiled"), (1448, 1, "tiled"), (1449, 1, "matrix_free"), (1449, 2, "tiled"), (4097, 2, "matrix_free")],
)
def test_the_path_is_the_one_that_was_measured_to_be_faster(tokens: int, iterations: int, path: str) -> None:
    q, k, _ = attention_inputs(1, 1, tokens, 8)
    assert choose(q, k, iterations=iterations).backend == path
