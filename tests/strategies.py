"""What hypothesis draws: small ViTs, their images, methods and budgets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import zoo
from families import METHODS, PROPORTIONAL
from hypothesis import settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import tokenprune

PATCH = 2
cheap = settings(max_examples=10 * settings.default.max_examples)
"""For what takes a millisecond."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Vit:
    """A drawn ViT: its shape says everything that differs."""

    grid: tuple[int, int]
    depth: int
    heads: int
    head_dim: int
    registers: int
    class_token: bool
    pool: str
    qk_norm: bool
    dynamic: bool
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def build(self) -> nn.Module:
        """The model in eval mode, weights large enough that every token matters."""
        model = _build(self)
        tokenprune.unpatch(model)
        return model

    def images(self, batch: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = (PATCH * self.grid[0], PATCH * self.grid[1])
        return torch.randn(batch, 3, *size, generator=generator).to(self.dtype)


@cache
def _build(vit: Vit) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=(PATCH * vit.grid[0], PATCH * vit.grid[1]),
            patch_size=PATCH,
            num_classes=5,
            embed_dim=vit.heads * vit.head_dim,
            depth=vit.depth,
            num_heads=vit.heads,
            class_token=vit.class_token,
            reg_tokens=vit.registers,
            global_pool=vit.pool,
            qk_norm=vit.qk_norm,
            init_values=0.5,
            dynamic_img_size=vit.dynamic,
        )
    zoo.randomise(model, seed=vit.depth)
    return model.to(vit.dtype).eval()


@st.composite
def vits(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Vit:
    class_token = draw(st.booleans())
    return Vit(
        grid=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        depth=draw(st.integers(1, 5)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([4, 8, 10])),
        registers=draw(st.integers(0, 3)),
        class_token=class_token,
        pool=draw(st.sampled_from(["token", "avg"] if class_token else ["avg", "map"])),
        qk_norm=draw(st.booleans()),
        dynamic=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
    )


def methods() -> st.SearchStrategy[str]:
    """The methods of a fixed budget that need neither training nor text."""
    return st.sampled_from(METHODS)


def options(method: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"proportional": st.booleans()} if method in PROPORTIONAL else {})


@st.composite
def budgets(draw: st.DrawFn, vit: Vit) -> dict[str, Any]:
    """One budget in the range that the contract names; whether it can be met is another question."""
    share = st.floats(0.02, 1.0, allow_nan=False)
    kind = draw(st.sampled_from(["keep", "flops", "tokens", "schedule"]))
    if kind == "tokens":
        return {"tokens": draw(st.integers(1, vit.tokens))}
    if kind == "schedule":
        return {"schedule": draw(st.dictionaries(st.integers(0, vit.depth - 1), share, min_size=1))}
    return {kind: draw(share)}
