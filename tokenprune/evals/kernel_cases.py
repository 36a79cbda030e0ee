"""What `kernel_bench` compares: each operation at N tokens by every way that this device has of computing it.

A case has the way "naive", the formula as the operation's `reference.py` writes it; "torch", what one would write with
torch's own operators to keep time and memory down; and each backend by its name. All give the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenprune.kernels.attention_mass import attention_mass
from tokenprune.kernels.attention_mass import choose as choose_mass
from tokenprune.kernels.attention_mass.reference import attention_mass as naive_mass
from tokenprune.kernels.attention_match import attention_match
from tokenprune.kernels.attention_match.reference import attention_match as naive_attention_match
from tokenprune.kernels.backends import refuse_triton
from tokenprune.kernels.class_attention import choose as choose_class
from tokenprune.kernels.class_attention import class_attention
from tokenprune.kernels.class_attention.reference import class_attention as naive_class
from tokenprune.kernels.matching import choose as choose_match
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.matching.reference import cosine_match as naive_match
from tokenprune.kernels.merge import choose_gather, choose_merge, gather, merge
from tokenprune.kernels.merge.reference import gather as naive_gather
from tokenprune.kernels.merge.reference import merge as naive_merge
from tokenprune.kernels.packed_attention import choose_backend, packed_attention
from tokenprune.kernels.packed_attention.fused import cumulative
from tokenprune.kernels.packed_attention.reference import packed_attention as naive_packed

DIM = 64
ITERATIONS = (1, 5, 30)


@dataclass(frozen=True)
class Case:
    """ways: by name. chosen: the backend that the dispatcher takes. naive_bytes: of the full maps in "naive"."""

    op: str
    tokens: int
    shape: str
    ways: Mapping[str, Callable[[], object]]
    chosen: str
    naive_bytes: int


def images_of(tokens: int) -> int:
    """16 small images, one large one: about as much work in each case."""
    return max(1, min(16, 4096 // tokens))


def heads_of(tokens: int) -> int:
    """Eight heads up to 4,096 tokens, one above."""
    return 8 if tokens <= 4096 else 1


def random_qkv(batch: int, tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [B, H, N, D] as a fused projection leaves them in memory."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = 2 * torch.randn(batch, tokens, 3, heads, DIM, generator=generator)
    return qkv.to(device, dtype).permute(2, 0, 3, 1, 4).unbind(0)


def mass_cases(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """attention_mass for one, five and thirty iterations; "torch" is one head of one image after another."""
    batch, heads = images_of(tokens), heads_of(tokens)
    q, k, _ = random_qkv(batch, tokens, heads, device, dtype)
    start = torch.full((batch, heads, tokens), 1 / tokens, device=device, dtype=dtype)
    for iterations in ITERATIONS:
        ways = {
            "naive": partial(naive_mass, q, k, start, iterations=iterations),
            "torch": partial(head_by_head, q, k, start, iterations),
        }
        for backend in ("tiled", "matrix_free", *_triton(q, k)):
            ways[backend] = partial(attention_mass, q, k, start, iterations=iterations, backend=backend)
        yield Case(
            f"attention_mass, {iterations} iteration{'s' * (iterations > 1)}",
            tokens,
            f"{batch} x {heads} heads of {DIM}",
            ways,
            choose_mass(q, k, iterations=iterations).backend,
            2 * batch * heads * tokens**2 * q.element_size(),
        )


def head_by_head(q: Tensor, k: Tensor, weights: Tensor, iterations: int) -> Tensor:
    """Attention mass with the map of one head at a time."""
    out = torch.empty_like(weights)
    for image in range(q.shape[0]):
        for head in range(q.shape[1]):
            attention = (q[image, head] @ k[image, head].T * q.shape[-1] ** -0.5).softmax(-1)
            mass = weights[image, head].to(attention.dtype)
            for _ in range(iterations):
                mass = mass @ attention
            out[image, head] = mass
    return out


def class_cases(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """class_attention; "torch" is the product with the one row."""
    batch, heads = images_of(tokens), heads_of(tokens)
    q, k, _ = random_qkv(batch, tokens, heads, device, dtype)
    ways: dict[str, Callable[[], object]] = {
        "naive": partial(naive_class, q, k),
        "torch": lambda: (q[:, :, :1] @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1).squeeze(2),
    }
    for backend in ("eager", *_triton(q, k)):
        ways[backend] = partial(class_attention, q, k, backend=backend)
    needed = 2 * batch * heads * tokens**2 * q.element_size()
    shape = f"{batch} x {heads} heads of {DIM}"
    yield Case("class_attention", tokens, shape, ways, choose_class(q, k).backend, needed)


def match_cases(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """cosine_match of every second token with the others, as ToMe does; "torch" is normalise, multiply, torch.max."""
    batch = images_of(tokens)
    metric = random_qkv(batch, tokens, 1, device, dtype)[0][:, 0]
    a, b = metric[:, ::2], metric[:, 1::2]
    ways: dict[str, Callable[[], object]] = {
        "naive": partial(naive_match, a, b),
        "torch": lambda: (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)).max(-1),
    }
    for backend in ("eager", *_triton(a, b)):
        ways[backend] = partial(cosine_match, a, b, backend=backend)
    yield Case("cosine_match", tokens, f"{batch} x {DIM}", ways, choose_match(a, b).backend, 0)


def attention_match_cases(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """attention_match of half of the tokens with the others, as at_edm recovers; "torch" is one head after another."""
    batch, heads = images_of(tokens), heads_of(tokens)
    q, k, _ = random_qkv(batch, tokens, heads, device, dtype)
    dropped, kept = q[:, :, ::2], torch.arange(1, tokens, 2, device=device).expand(batch, -1)
    ways = {
        "naive": partial(naive_attention_match, dropped, k, kept),
        "torch": partial(match_head_by_head, dropped, k, kept),
        "eager": partial(attention_match, dropped, k, kept),
    }
    needed = batch * heads * tokens**2 * q.element_size()
    yield Case("attention_match", tokens, f"{batch} x {heads} heads of {DIM}", ways, "eager", needed)


def match_head_by_head(q: Tensor, k: Tensor, columns: Tensor) -> Tensor:
    """Attention match with the map of one head of all images at a time."""
    index = columns[:, None].expand(-1, q.shape[2], -1)
    total = torch.zeros(index.shape, device=q.device, dtype=q.dtype)
    for head in range(q.shape[1]):
        attention = (q[:, head] @ k[:, head].transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        total += attention.gather(2, index)
    return total.argmax(-1)


def merge_cases(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """merge of a quarter of the tokens into the others, and gather of half of them, each image its own."""
    batch, channels = images_of(tokens), 6 * DIM
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, channels, generator=generator).to(device, dtype)
    order = torch.rand(batch, tokens, generator=generator).argsort(1).to(device)
    moved, kept = order[:, : tokens // 4], order[:, tokens // 4 :]
    target = torch.randint(0, kept.shape[1], moved.shape, generator=generator).to(device)
    sizes = torch.ones(batch, tokens, device=device)
    ways: dict[str, Callable[[], object]] = {
        "naive": lambda: naive_merge(x, kept, moved, target, sizes)[0],
        "torch": partial(scatter_merge, x, kept, moved, target, sizes),
    }
    for backend in ("eager", *_triton(x)):
        ways[backend] = partial(first_of, partial(merge, x, kept, moved, target, sizes, backend=backend))
    yield Case("merge", tokens, f"{batch} x {channels}", ways, choose_merge(x, sizes).backend, 0)
    half = order[:, ::2].contiguous()
    ways = {
        "naive": partial(naive_gather, x, half),
        "torch": lambda: x.gather(1, half.unsqueeze(-1).expand(-1, -1, channels)),
    }
    for backend in ("eager", *_triton(x)):
        ways[backend] = partial(gather, x, half, backend=backend)
    yield Case("gather", tokens, f"{batch} x {channels}", ways, choose_gather(x).backend, 0)


def first_of(way: Callable[[], tuple[Tensor, ...]]) -> Tensor:
    """The merged tokens without their sizes."""
    return way()[0]


def scatter_merge(x: Tensor, kept: Tensor, moved: Tensor, target: Tensor, sizes: Tensor) -> Tensor:
    """Merging as ToMe's own code goes about it: everything weighted first, then scatter_reduce."""
    channels = x.shape[2]
    weighted = x * sizes.unsqueeze(-1)
    out = weighted.gather(1, kept.unsqueeze(-1).expand(-1, -1, channels))
    gone = weighted.gather(1, moved.unsqueeze(-1).expand(-1, -1, channels))
    out = out.scatter_reduce(1, target.unsqueeze(-1).expand_as(gone), gone, "sum")
    total = sizes.gather(1, kept).scatter_reduce(1, target, sizes.gather(1, moved), "sum")
    return (out / total.unsqueeze(-1)).to(x.dtype)


def packed_cases(tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """packed_attention of images that keep 30% to 90% of N tokens; "torch" is a padded batch under a mask."""
    batch, heads = max(4, images_of(tokens)), heads_of(tokens)
    q, k, v = random_qkv(batch, tokens, heads, device, dtype)
    lengths = [round(tokens * share) for share in torch.linspace(0.3, 0.9, batch, dtype=torch.float64).tolist()]
    q_packed, k_packed, v_packed = (
        torch.cat([x[i, :, :n].transpose(0, 1) for i, n in enumerate(lengths)]) for x in (q, k, v)
    )
    starts, longest = cumulative(lengths, device), max(lengths)
    mask = (torch.arange(longest, device=device) < starts.diff()[:, None])[:, None, None]
    q, k, v = (x[:, :, :longest] for x in (q, k, v))
    ways: dict[str, Callable[[], object]] = {
        "naive": partial(naive_packed, q_packed, k_packed, v_packed, lengths),
        "torch": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    chosen = choose_backend(q_packed, v_packed).backend
    for backend in dict.fromkeys(("per_length", chosen)):
        ways[backend] = partial(
            packed_attention, q_packed, k_packed, v_packed, starts, lengths=lengths, backend=backend
        )
    shape = f"{batch} x {heads} heads of {DIM}"
    yield Case("packed_attention", tokens, shape, ways, chosen, 2 * longest**2 * q.element_size())


def _triton(*tensors: Tensor) -> tuple[str, ...]:
    return ("triton",) if tensors[0].is_cuda and refuse_triton(*tensors) is None else ()


CASES: dict[str, Callable[[int, torch.device, torch.dtype], Iterator[Case]]] = {
    "attention_mass": mass_cases,
    "class_attention": class_cases,
    "cosine_match": match_cases,
    "attention_match": attention_match_cases,
    "merge": merge_cases,
    "packed_attention": packed_cases,
}
