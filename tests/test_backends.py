"""Promise 4: the host's own attention is what runs, and no full attention map is made that the host does not make."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import zoo
from families import FAMILIES, FEW, METHODS, build, images, options, patches, run
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokenprune

# The families whose attention goes through torch's one call for it; the others multiply by hand.
FUSED = [family for family in FAMILIES if family not in ("talking_heads", "bias_own_mlp", "bias_shared")]
# Every family once, the methods in turn.
PAIRS = [(family, ("top_k", "zero_tprune", "tome")[i % 3]) for i, family in enumerate(FAMILIES)]
LIMIT = 64 * 2**20  # bytes, of everything that a score makes of an attention map


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of queries of each call of torch's attention."""
    seen: list[int] = []
    plain = F.scaled_dot_product_attention

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.shape[-2])
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def unfuse(model: nn.Module) -> None:
    """What timm.layers.set_fused_attn(False) does to the models made after it."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


@pytest.mark.parametrize(("family", "method"), [pair for pair in PAIRS if pair[0] in FUSED])
def test_torch_attention_is_called_as_often_and_on_the_tokens_that_are_left(
    family: str, method: str, calls: list[int]
) -> None:
    model = build(family)
    x = images(model)
    run(model, x)
    plain = list(calls)
    assert plain
    shares = {1: 0.7, 2: 0.6}
    tokenprune.patch(model, method, schedule=shares, prefix_only_last=False, **options(family, method))
    calls.clear()
    run(model, x)
    full = patches(model)
    lost = [0, 0, full - 25, full - 15]  # 35 -> 25 -> 15, behind the attention of blocks 1 and 2
    each = 2 if family in ("differential", "differential_parallel", "parallel_things") else 1
    blocks = [tokens - lost[i // each] for i, tokens in enumerate(plain[: 4 * each])]
    assert calls == blocks + plain[4 * each :]


@pytest.mark.parametrize("family", [*FEW, "differential", "parallel_things"])
def test_without_fused_attention_torch_attention_is_not_called(family: str, calls: list[int]) -> None:
    model = build(family)
    x = images(model)
    tokenprune.patch(model, "tome", keep=0.5)
    fused = run(model, x)
    unfuse(model)
    calls.clear()
    torch.testing.assert_close(run(model, x), fused, rtol=1e-3, atol=1e-3)
    assert not calls


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_the_math_backend_gives_the_same(family: str, method: str) -> None:
    model = tokenprune.patch(build(family), method, keep=0.5, **options(family, method))
    x = images(model)
    fused = run(model, x)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(run(model, x), fused, rtol=1e-3, atol=1e-3)


class Shapes(TorchDispatchMode):
    """Every operator that runs and the shapes that it makes, inside our own operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        if func.namespace == "tokenprune":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out

    def attention(self) -> list[str]:
        """The calls of torch's attention."""
        return [name for name in self.operators if "scaled_dot_product" in name]

    def maps(self) -> list[tuple[int, ...]]:
        """The shapes of nothing but tokens by tokens: channels are fewer."""
        return [shape for shape in self.shapes if len(shape) > 1 and min(shape[-2:]) >= FEWEST]


BATCH, HEADS, GRID = 8, 16, 20
TOKENS = GRID * GRID + 1
SHARES = {0: 0.8, 1: 0.8}
FEWEST = 256  # behind the second place
OF_ALL_QUERIES = ("zero_tprune", "zero_tprune_uni", "k_medoids")  # score by the attention of every query


@pytest.fixture
def wide() -> nn.Module:
    """Small but for its tokens: eight images' maps take 82 MB."""
    shape = {"depth": 2, "embed_dim": 32, "num_heads": HEADS, "img_size": 2 * GRID, "patch_size": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **shape).eval()
    zoo.randomise(model, 0)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_no_attention_map_is_made_by_us(wide: nn.Module, method: str) -> None:
    x = torch.randn(BATCH, 3, 2 * GRID, 2 * GRID)
    with Shapes() as plain:
        run(wide, x)
    assert not plain.maps()
    tokenprune.patch(wide, method, schedule=SHARES)
    with Shapes() as patched:
        run(wide, x)
    assert patched.attention() == plain.attention()
    assert 4 * BATCH * HEADS * TOKENS * TOKENS > LIMIT
    assert all(4 * torch.Size(shape).numel() <= LIMIT for shape in patched.maps())
    assert any("attention_mass" in name for name in patched.operators) == (method in OF_ALL_QUERIES)


def test_a_map_would_be_seen(wide: nn.Module) -> None:
    unfuse(wide)
    with Shapes() as seen:
        run(wide, torch.randn(2, 3, 2 * GRID, 2 * GRID))
    assert (2, HEADS, TOKENS, TOKENS) in seen.maps()
