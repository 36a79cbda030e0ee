"""LTMP's training forward by loops over tokens, in float64: what is masked, what that costs, and the gradients.

Written from the paper (Bonnaerens and Dambre, TMLR 2023): a key's weight in a softmax is multiplied with its mask; a
mask is hard forwards and has the gradient of a sigmoid. Nothing here comes from the package under test.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

TEMPERATURE = 0.1


def above(value: float, threshold: Tensor) -> Tensor:
    """One where `value` is above the threshold, else zero, with the gradient of the sigmoid."""
    soft = torch.sigmoid((value - threshold) / TEMPERATURE)
    return float(value > threshold.item()) + (soft - soft.detach())


def attend(
    attention: nn.Module, x: Tensor, masks: Sequence[Tensor], sizes: Sequence[float]
) -> tuple[Tensor, Tensor, list]:
    """The attention's output [N, C], its mean keys [N, D], and what each token gets from those that are there."""
    n, heads = len(x), attention.num_heads
    q, k, v = attention.qkv(x).reshape(n, 3, heads, -1).permute(1, 2, 0, 3)
    q, k = attention.q_norm(q), attention.k_norm(k)
    alive = [j for j in range(n) if masks[j].item() == 1]
    importance = [0.0] * n
    rows = []
    for head in range(heads):
        for i in range(n):
            logits = torch.stack([(q[head, i] @ k[head, j]) * attention.scale + math.log(sizes[j]) for j in range(n)])
            weights = torch.exp(logits - logits.max().detach()) * torch.stack(list(masks))
            weights = weights / weights.sum()
            rows.append(weights @ v[head])
            if i in alive:
                for j in alive:
                    importance[j] += weights[j].item() / heads / len(alive)
    out = torch.stack(rows).reshape(heads, n, -1).transpose(0, 1).reshape(n, -1)
    return attention.proj(attention.norm(out)), k.mean(0).detach(), importance


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def decide(
    masks: list[Tensor],
    sizes: list[float],
    x: Tensor,
    keys: Tensor,
    importance: list,
    prefix: int,
    thresholds: Sequence[Tensor],
) -> tuple[list[Tensor], list[float], Tensor]:
    """Masks, sizes and tokens behind the thresholds (merge, prune) of a block."""
    merge, prune = thresholds
    alive = [j for j in range(prefix, len(x)) if masks[j].item() == 1]
    side_a = [j for place, j in enumerate(alive) if (place + prefix) % 2 == 0]
    side_b = [j for place, j in enumerate(alive) if (place + prefix) % 2 == 1]
    masks, sizes, x, importance = list(masks), list(sizes), list(x), list(importance)
    moved: dict[int, list[int]] = {}
    before = list(importance)
    for a in side_a if side_b else ():
        cosines = [cosine(keys[a], keys[b]) for b in side_b]
        best = max(range(len(side_b)), key=cosines.__getitem__)
        goes = above(max(0.0, cosines[best]), merge)
        masks[a] = masks[a] * (1 - goes)
        if goes.item() == 1:
            moved.setdefault(side_b[best], []).append(a)
    new = list(x)
    for b, others in moved.items():
        group = [b, *others]
        new[b] = sum(sizes[j] * x[j] for j in group) / sum(sizes[j] for j in group)
        importance[b] = max(before[j] for j in group)
    for b, others in moved.items():
        sizes[b] += sum(sizes[j] for j in others)
    for j in alive:
        masks[j] = masks[j] * above(importance[j], prune)
    if not any(masks[j].item() == 1 for j in alive):
        masks[alive[0]] = masks[alive[0]] + (1 - masks[alive[0]]).detach()
    return masks, sizes, torch.stack(new)


def flops(shares: Sequence[Tensor], n: int, d: int) -> Tensor:
    """The ratio of the authors' training script."""
    total, before = 0.0, 1.0
    for after in shares:
        attention = 2 * (before * n) * d**2 + (before * n) ** 2 * d
        total = total + (attention + 4 * (after * n) * d**2) / (6 * n * d**2 + n**2 * d)
        before = after
    return total / len(shares)


def run(model: nn.Module, images: Tensor, thresholds: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor], list]:
    """Logits [B, classes]; the mean mask behind each block, prefix tokens counted; and which patches are left there,
    of each image. thresholds: (merge, prune) of each block, float64."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    prefix, logits, left = model.num_prefix_tokens, [], []
    means = [torch.zeros((), dtype=torch.float64) for _ in model.blocks]
    for image in images.double():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image[None]))))[0]
        masks, sizes = [torch.ones((), dtype=torch.float64) for _ in x], [1.0] * len(x)
        left.append([])
        for index, (block, own) in enumerate(zip(model.blocks, thresholds, strict=True)):
            attended, keys, importance = attend(block.attn, block.norm1(x), masks, sizes)
            x = x + block.ls1(attended)
            masks, sizes, x = decide(masks, sizes, x, keys, importance, prefix, own)
            x = x + block.ls2(block.mlp(block.norm2(x)))
            means[index] = means[index] + sum(masks) / len(masks) / len(images)
            left[-1].append([j - prefix for j in range(prefix, len(x)) if masks[j].item() == 1])
        logits.append(model.forward_head(model.norm(x)[None])[0])
    return torch.stack(logits), means, left
