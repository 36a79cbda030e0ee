"""DynamicViT's predictors and the mixtures of SiT, Sinkhorn and PatchMerger, by loops over the tokens of one image.

Written from Rao et al., "DynamicViT" (NeurIPS 2021, section 3), and from Haurum et al., "Which Tokens to Use?" (2023):
each takes the learned tensors of one place by name, in float64. Nothing here comes from the package under test.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from naive_ltmp import attend
from naive_methods import highest
from naive_vit import Place, Token
from torch import Tensor, nn

Learned = Mapping[str, Tensor]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return torch.stack([(value - mean) / torch.sqrt(variance + 1e-5) for value in x]) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def linear(x: Tensor, learned: Learned, name: str) -> Tensor:
    return learned[f"{name}.weight"] @ x + learned[f"{name}.bias"]


def decisions(hidden: Sequence[Tensor], alive: Sequence[float], learned: Learned) -> list[Tensor]:
    """Of each token the logits of keeping and of dropping it."""
    normed = [layer_norm(x, learned["norm.weight"], learned["norm.bias"]) for x in hidden]
    embedded = [gelu(linear(x, learned, "embed")) for x in normed]
    half = len(hidden[0]) // 2
    there = [x[half:] for x, one in zip(embedded, alive, strict=True) if one == 1]
    whole = sum(there) / len(there)
    found = []
    for x in embedded:
        x = torch.cat([x[:half], whole])
        found.append(linear(gelu(linear(gelu(linear(x, learned, "first")), learned, "second")), learned, "last"))
    return found


def dynamicvit(place: Place, learned: Mapping[int, Learned]) -> list[Token]:
    """The tokens that are kept with the highest probability."""
    logits = decisions([token.hidden for token in place.tokens], [1.0] * len(place.tokens), learned[place.block])
    # By the odds, which have the order of the probabilities and do not round to one.
    return [place.tokens[j] for j in highest([(a - b).item() for a, b in logits], place.keep, place.margins)]


def softmax(row: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def mixed(place: Place, weights: Sequence[Sequence[float]]) -> list[Token]:
    """Sums of all tokens by the `weights` [leaving][entering]; a token counts as part of that to which it adds most."""
    tokens = place.tokens
    members: list[list[int]] = [[] for _ in weights]
    for j, token in enumerate(tokens):
        column = [row[j] for row in weights]
        members[largest(column, place.margins)] += token.members
    leaving = []
    for row, own in zip(weights, members, strict=True):
        hidden = sum(weight * token.hidden for weight, token in zip(row, tokens, strict=True))
        leaving.append(Token(hidden, tuple(sorted(own)), tokens[largest(row, place.margins)].representative))
    return leaving


def largest(values: Sequence[float], margins: list[float]) -> int:
    ordered = sorted(range(len(values)), key=lambda j: -values[j])
    margins.append((values[ordered[0]] - values[ordered[1]]) / values[ordered[0]])
    return ordered[0]


def sit(place: Place, learned: Mapping[int, Learned]) -> list[Token]:
    own = learned[place.block]
    logits = []
    for token in place.tokens:
        x = layer_norm(token.hidden, own["norm.weight"], own["norm.bias"])
        x = linear(gelu(linear(x, own, "hidden")), own, "mixtures")
        logits.append([(own["scale"] * value).item() for value in x])
    return mixed(place, [softmax([row[m] for row in logits]) for m in range(place.keep)])


def patch_merger(place: Place, learned: Mapping[int, Learned]) -> list[Token]:
    own = learned[place.block]
    normed = [layer_norm(token.hidden, own["norm.weight"], own["norm.bias"]) for token in place.tokens]
    return mixed(place, [softmax([(query @ x).item() for x in normed]) for query in own["queries"]])


def sinkhorn(place: Place, learned: Mapping[int, Learned]) -> list[Token]:
    """Averages by the transport of the tokens to the centres, by cosines."""
    centres, tokens = learned[place.block]["centres"], place.tokens
    cosines = [
        [(centre @ token.hidden / centre.norm() / token.hidden.norm()).item() for token in tokens] for centre in centres
    ]
    return mixed(place, [[value / sum(row) for value in row] for row in transport(cosines)])


def transport(similarity: Sequence[Sequence[float]]) -> list[list[float]]:
    """exp of the similarities, its rows and then its columns divided by their sums, three times."""
    plan = [[math.exp(value) for value in row] for row in similarity]
    for _ in range(3):
        plan = [[value / sum(row) for value in row] for row in plan]
        columns = [sum(row[j] for row in plan) for j in range(len(plan[0]))]
        plan = [[value / column for value, column in zip(row, columns, strict=True)] for row in plan]
    return plan


def masked_forward(
    model: nn.Module, image: Tensor, learned: Mapping[int, Learned], noise: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """DynamicViT's training forward of one image: logits [classes], tokens behind the last block [P + n, C], and the
    masks behind each place.

    noise: {block: [n, 2]} Gumbel noise of each place. A decision is one where keeping has the larger noisy logit, with
    the gradient of the softmax of both; it multiplies those before it.
    """
    model = copy.deepcopy(model).double().requires_grad_(False)
    prefix, behind = model.num_prefix_tokens, []
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image[None].double()))))[0]
    masks = [torch.ones((), dtype=torch.float64) for _ in x]
    for index, block in enumerate(model.blocks):
        x = x + block.ls1(attend(block.attn, block.norm1(x), masks, [1.0] * len(x))[0])
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if index in learned:
            alive = [mask.item() for mask in masks[prefix:]]
            logits = decisions(list(x[prefix:]), alive, learned[index])
            drawn = []
            for pair, extra in zip(logits, noise[index], strict=True):
                keep, drop = pair + extra
                soft = torch.exp(keep) / (torch.exp(keep) + torch.exp(drop))
                drawn.append(float(keep > drop) + (soft - soft.detach()))
            masks = masks[:prefix] + [mask * one for mask, one in zip(masks[prefix:], drawn, strict=True)]
            behind.append(masks[prefix:])
    return model.forward_head(model.norm(x)[None])[0], x, behind


def ratio_loss(places: Sequence[Sequence[Sequence[Tensor]]], shares: Sequence[float]) -> Tensor:
    """Twice the mean over places and images of (kept share - the share that is to be kept) squared. places: the masks
    [place][image][token]."""
    terms = [
        (sum(masks) / len(masks) - share) ** 2 for images, share in zip(places, shares, strict=True) for masks in images
    ]
    return 2 * sum(terms) / len(terms)


def token_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], kept: Sequence[bool]) -> Tensor:
    """Mean over the kept tokens and their channels of the squared difference, tokens brought to mean 0 and variance
    1."""
    ones, zeros = torch.ones_like(student[0]), torch.zeros_like(student[0])
    pairs = [
        (layer_norm(a, ones, zeros) - layer_norm(b, ones, zeros)).square().mean()
        for a, b, own in zip(student, teacher, kept, strict=True)
        if own
    ]
    return sum(pairs) / len(pairs)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """sum over classes of teacher * log(teacher / student), of the probabilities of one image."""
    own, given = torch.exp(student) / torch.exp(student).sum(), torch.exp(teacher) / torch.exp(teacher).sum()
    return sum(b * torch.log(b / a) for a, b in zip(own, given, strict=True))
