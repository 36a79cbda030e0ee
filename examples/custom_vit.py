"""A vision transformer that no library ships, adapted: the ten lines of `TinyVitAdapter.host`.

Run it: python examples/custom_vit.py
"""

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.host import BlockHost, Host


class TinyAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.on_queries, self.on_keys = nn.Identity(), nn.Identity()  # where tokenprune can listen

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.on_queries(q), self.on_keys(k)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TinyBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TinyAttention(dim, heads)
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyVit(nn.Module):
    def __init__(self, dim: int = 64, depth: int = 6, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(0.02 * torch.randn(1, 65, dim))
        self.blocks = nn.ModuleList(TinyBlock(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@tokenprune.register_adapter
class TinyVitAdapter:
    name = "tiny_vit"

    def find(self, target: nn.Module) -> nn.Module | None:
        return next((module for module in target.modules() if isinstance(module, TinyVit)), None)

    def host(self, model: nn.Module) -> Host:
        blocks = [
            BlockHost(
                f"blocks.{i}",
                block,
                taps=(("queries", block.attn.on_queries), ("keys", block.attn.on_keys)),
                scale=(block.attn.proj.in_features // block.attn.heads) ** -0.5,
            )
            for i, block in enumerate(model.blocks)
        ]
        image = lambda: torch.empty(1, 3, 64, 64, device=model.pos.device, dtype=model.pos.dtype)  # noqa: E731
        return Host(model, blocks, num_prefix_tokens=1, tokens=64, grid=(8, 8), example=image)


def main() -> None:
    model, images = TinyVit().eval(), torch.randn(2, 3, 64, 64)
    tokenprune.patch(model, "zero_tprune", flops=0.6)
    print(model(images).shape)
    print(tokenprune.report(model))
    tokenprune.unpatch(model)


if __name__ == "__main__":
    main()
