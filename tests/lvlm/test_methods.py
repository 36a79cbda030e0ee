"""Methods behind the tower against loops over tokens, by the attention that the host itself computed."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
import transformers
from lvlm_zoo import KINDS, Example, build, by_hand, close, generate, most_in_full, prompt
from torch import Tensor, nn

import tokenprune

CLASS_TOKEN = {"llava": 1, "llava_next": 1, "internvl": 1}
LAYER = {"llava": -2, "llava_next": -2}
FIXED = [name for name in KINDS if name not in ("llava_next", "onevision")]


def attention_maps(name: str, example: Example, layer: int | None = None) -> list[Tensor]:
    """Maps [T, H, N, N] of the tower's layer, one for each call of the host's own attention there, in eager mode."""
    model = build(name, "eager")
    found: list[tuple[Any, Tensor]] = []
    tower = (
        getattr(model.model, "vision_tower", None) or getattr(model.model, "visual", None) or model.model.vision_model
    )
    library = sys.modules[type(tower).__module__]
    function = library.eager_attention_forward

    def look(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out, weights = function(module, *args, **kwargs)
        if any(module is part for part in tower.modules()):
            found.append((module, weights))
        return out, weights

    library.eager_attention_forward = look
    try:
        model(**example.inputs)
    finally:
        library.eager_attention_forward = function
    modules = list(dict.fromkeys(module for module, _ in found))
    wanted = modules[LAYER.get(name, -1) if layer is None else layer]
    return [weights for module, weights in found if module is wanted]


def patch_scores(name: str, maps: list[Tensor], query: str) -> list[list[float]]:
    """Attention received by each patch of each tile, mean over heads, from all tokens or the class token."""
    prefix = CLASS_TOKEN.get(name, 0)
    scores = []
    for tile in torch.cat(maps) if all(m.shape == maps[0].shape for m in maps) else [m[0] for m in maps]:
        heads, tokens, _ = tile.shape
        rows = range(tokens) if query == "mean" else [0]
        scores.append(
            [
                sum(float(tile[h, i, j]) for h in range(heads) for i in rows) / (heads * len(rows))
                for j in range(prefix, tokens)
            ]
        )
    return scores


def class_scores_of_layers(name: str, example: Example, start: int = 0) -> list[list[float]]:
    """The class token's attention, mean over the layers from `start` to the one whose output is used."""
    depth = build(name).config.vision_config.num_hidden_layers
    layers = range(start, depth + LAYER.get(name, -1) + 1)
    assert len(layers) > 1
    found = [patch_scores(name, attention_maps(name, example, layer), "class") for layer in layers]
    return [[sum(column) / len(layers) for column in zip(*tiles, strict=True)] for tiles in zip(*found, strict=True)]


def placeholder_scores(name: str, tiles: list[list[float]]) -> list[list[float]]:
    """Means over the patches that a placeholder stands for."""
    if name in ("llava", "paligemma"):
        return tiles
    if name.startswith("qwen"):  # four in a row are one; Qwen2.5-VL's row is ordered by windows of 4 x 4 patches
        merged = [[sum(row[i : i + 4]) / 4 for i in range(0, len(row), 4)] for row in tiles]
        if name != "qwen2_5_vl":
            return merged
        order = [(r, c) for wr in (0, 2) for wc in (0, 2) for r in (wr, wr + 1) for c in (wc, wc + 1)]
        return [[dict(zip(order, row, strict=True))[r, c] for r in range(4) for c in range(4)] for row in merged]
    return [
        [sum(t[(2 * r + a) * 4 + 2 * c + b] for a in (0, 1) for b in (0, 1)) / 4 for r in (0, 1) for c in (0, 1)]
        for t in tiles
    ]


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def kept_by(model: nn.Module, example: Example, method: str, **options: Any) -> list[list[int]]:
    """What a method keeps of each image."""
    with tokenprune.patched(model, method, **options), tokenprune.record(model) as recording:
        model(**example.inputs)
    return [sorted(row.tolist()) for forward in recording.forwards for row in forward.places[0].kept]


@pytest.mark.parametrize("name", most_in_full("llava", "qwen2_5_vl", "internvl", names=FIXED))
def test_the_attention_is_that_of_the_host(name: str) -> None:
    example, model = prompt(name), build(name)
    maps = attention_maps(name, example)
    received = placeholder_scores(name, patch_scores(name, maps, "mean"))
    keep = math.ceil(len(received[0]) / 4)
    assert kept_by(model, example, "fopru", keep=0.25) == [best(row, keep) for row in received]
    if name in CLASS_TOKEN:
        received = placeholder_scores(name, patch_scores(name, maps, "class"))
        assert kept_by(model, example, "fopru", keep=0.25, query="cls") == [best(row, keep) for row in received]
        received = placeholder_scores(name, class_scores_of_layers(name, example))
    else:
        with pytest.raises(tokenprune.UnsupportedMethod, match="a class token"):
            tokenprune.patch(model, "fopru", query="cls")
    assert kept_by(model, example, "top_k", keep=0.25) == [best(row, keep) for row in received]


@pytest.mark.parametrize("name", ["llava_next", pytest.param("onevision", marks=pytest.mark.full)])
def test_tiles_are_packed_as_the_host_packs_them(name: str) -> None:
    example, model = prompt(name), build(name)
    base, *tiles = patch_scores(name, attention_maps(name, example), "mean")
    grid = [tiles[2 * (r // 4) + c // 4][(r % 4) * 4 + c % 4] for r in range(8) for c in range(8)]
    assert kept_by(model, example, "fopru", keep=0.25) == [best(base + grid, 20)]


def test_whole_rows() -> None:
    example, model = prompt("qwen2_vl", size=1), build("qwen2_vl")  # two rows of four
    scores = placeholder_scores("qwen2_vl", patch_scores("qwen2_vl", attention_maps("qwen2_vl", example), "mean"))[0]
    row = 0 if sum(scores[:4]) > sum(scores[4:]) else 1
    assert kept_by(model, example, "fopru", strategy="row", keep=0.6) == [list(range(4 * row, 4 * row + 4))]
    with (
        tokenprune.patched(model, "fopru", strategy="row", tokens=3),
        pytest.raises(tokenprune.BudgetError, match="tokens=4"),
    ):
        model(**example.inputs)
    with pytest.raises(tokenprune.UnsupportedMethod, match="'rank' or 'row'"):
        tokenprune.patch(model, "fopru", strategy="column")


def tower_states(model: Any, example: Example, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """(features' hidden states [n, C], queries and keys [N, C] of a layer) of LLaVA's tower, unpatched."""
    tower = model.model.vision_tower
    states = tower(example.inputs["pixel_values"], output_hidden_states=True).hidden_states
    block = tower.encoder.layers[layer]
    x = block.layer_norm1(states[len(states) - 1 + layer])[0]
    return states[-2][0, 1:], block.self_attn.q_proj(x), block.self_attn.k_proj(x)


def with_features(model: Any, example: Example, hidden: Tensor) -> Any:
    """A change of the embeddings: the image's are the projected `hidden` [n, C]."""

    def change(embeds: Tensor) -> Tensor:
        embeds = embeds.clone()
        embeds[0, example.images[0]] = model.model.multi_modal_projector(hidden[None])[0]
        return embeds

    return change


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@torch.no_grad()
@pytest.mark.parametrize("layers", [{}, {"start_layer": 0}], ids=["one layer", "all layers"])
def test_visionzip(layers: dict[str, int]) -> None:
    example, model = prompt("llava"), build("llava")
    scores = patch_scores("llava", attention_maps("llava", example), "class")[0]
    if layers:
        alone, scores = scores, class_scores_of_layers("llava", example)[0]
        assert best(scores, 6) != best(alone, 6)
    hidden, _, keys = tower_states(model, example, -2)
    metric = keys[1:].view(16, 4, 8).mean(1)
    dominant = best(scores, 6)
    rest = [i for i in range(16) if i not in dominant]
    targets = rest[:: len(rest) // 2][:2]
    merged = hidden.clone()
    groups: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            groups[max(targets, key=lambda t: cosine(metric[i], metric[t]))].append(i)
    for t, members in groups.items():
        if members:
            merged[t] = hidden[t] + torch.stack([hidden[i] for i in members]).mean(0)
    gone = [example.images[0][i] for i in range(16) if i not in dominant + targets]
    expected = by_hand(model, example.inputs, gone, change=with_features(model, example, merged))
    with tokenprune.patched(model, "visionzip", tokens=8, contextual=0.25, **layers):
        close(generate(model, example.inputs), expected)
    assert (by_hand(model, example.inputs, gone)[1] - expected[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("start", [None, 1])
def test_prumerge(start: int | None, spatial: bool) -> None:
    example, model = prompt("llava"), build("llava")
    hidden, q, k = tower_states(model, example, -1)
    row = (q[0] @ k.T / 32**0.5).softmax(0)[1:]
    if start is not None:
        _, before, keys = tower_states(model, example, -2)
        row = (row + (before[0] @ keys.T / 32**0.5).softmax(0)[1:]) / 2
    scores = row.tolist()
    ordered = sorted(scores)
    quartile = [ordered[int(p)] + (p % 1) * (ordered[int(p) + 1] - ordered[int(p)]) for p in (15 * 0.25, 15 * 0.75)]
    outliers = [i for i in range(16) if scores[i] > quartile[1] + 1.5 * (quartile[1] - quartile[0])]
    assert 1 <= len(outliers) <= 3

    def chosen(by_attention: int, more: int) -> list[int]:
        even = [(2 * j + 1) * 16 // (2 * more) for j in range(more)]
        first = best(scores, by_attention)
        both = sorted({*first, *even})
        left = sorted((i for i in range(16) if i not in both), key=lambda i: -scores[i])
        return sorted([*both, *left[: by_attention + more - len(both)]])

    if spatial:
        cases = [(chosen(len(outliers), 3 * len(outliers)), {}), (chosen(2, 5), {"tokens": 8})]
    else:
        cases = [(outliers, {}), (best(scores, 5), {"tokens": 6})]
    for kept, budget in cases:
        rest = [i for i in range(16) if i not in kept]
        merged = hidden.clone()
        for i in kept:
            others = sorted((j for j in range(16) if j != i), key=lambda j: -cosine(k[1 + i], k[1 + j]))[:3]
            merged[i] = hidden[i] + sum(scores[j] * hidden[j] for j in others)
        extra = max(rest, key=lambda i: scores[i])
        merged[extra] = sum(scores[j] * hidden[j] for j in rest)
        gone = [example.images[0][i] for i in rest if i != extra]
        expected = by_hand(model, example.inputs, gone, change=with_features(model, example, merged))
        with tokenprune.patched(model, "prumerge", neighbours=3, spatial=spatial, start_layer=start, **budget):
            close(generate(model, example.inputs), expected)


TOWERS = [
    ("Dinov2WithRegisters", "default", 4),
    ("Dinov2WithRegisters", "full", 5),
    ("Dinov2", "default", 0),
    ("DeiT", "default", 1),
    ("ViT", "full", 1),
    ("Beit", "default", 0),
    ("DINOv3ViT", "default", 2),
    ("ViTMSN", "default", 0),
]


def llava_with(tower: str, strategy: str) -> Any:
    """Llava with another tower, of 16 patches."""
    more = {
        "Dinov2WithRegisters": {"num_register_tokens": 4},
        "DINOv3ViT": {"num_register_tokens": 2, "intermediate_size": 64},
    }.get(tower, {})
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    config = copy.deepcopy(build("llava").config)
    config.vision_config = getattr(transformers, f"{tower}Config")(**sizes, **more)
    config.vision_feature_select_strategy = strategy
    torch.manual_seed(0)
    model: Any = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    model.generation_config.eos_token_id = None
    return model


def projected(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the projector is given [images, n, C]."""
    given: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(**inputs)
    hook.remove()
    return given[0]


@torch.no_grad()
@pytest.mark.parametrize(("tower", "strategy", "more"), TOWERS)
def test_tokens_of_other_towers_that_are_no_patches_stay(tower: str, strategy: str, more: int) -> None:
    """Class and register tokens that the model is given beside the patches."""
    model, example = llava_with(tower, strategy), prompt("llava")
    ids = example.inputs["input_ids"]
    start = example.images[0][0]
    ids = torch.cat([ids[:, :start], ids[:, start : start + 1].expand(1, more), ids[:, start:]], 1)
    inputs = {**example.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = generate(model, inputs)
    for method, options in (("uniform", {"tokens": 4}), ("divprune", {"tokens": 4}), ("visionzip", {"tokens": 6})):
        if method == "visionzip" and tower in ("Beit", "DINOv3ViT", "ViTMSN"):
            with pytest.raises(tokenprune.UnsupportedMethod, match="attention"):
                tokenprune.patch(model, method, **options)
            continue
        (before,) = projected(model, inputs)
        with tokenprune.patched(model, method, **options), tokenprune.record(model) as recording:
            got = generate(model, inputs)
            (after,) = projected(model, inputs)
        (kept,) = recording.forwards[0].places[0].kept.tolist()
        gone = [start + more + i for i in range(16) if i not in kept]
        if method == "visionzip":
            changed = (before != after).any(1).nonzero().flatten().tolist()
            assert len(changed) == 1
            rest = [more + i for i in range(16) if i not in kept]
            assert torch.allclose(after[changed[0]], before[changed[0]] + before[rest].mean(0), atol=1e-5)
        else:
            close(got, by_hand(model, inputs, gone))
        if method == "uniform":
            assert kept == [2, 6, 10, 14]
    with tokenprune.patched(model, "uniform", keep=1.0):
        close(generate(model, inputs), plain)


def test_patches_that_are_taken_for_other_tokens_are_refused_when_patched() -> None:
    with pytest.raises(tokenprune.UnsupportedModel, match="use 'full'"):
        tokenprune.patch(llava_with("SiglipVision", "default"), "uniform", keep=0.5)
    model = build("llava_next")
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(tokenprune.UnsupportedModel, match="strategy='default'"):
        tokenprune.patch(model, "uniform", keep=0.5)


def test_layers_that_cannot_be_looked_at_are_refused() -> None:
    for method, last in (("visionzip", 1), ("prumerge", 2)):
        with pytest.raises(tokenprune.UnsupportedMethod, match=f"use start_layer=0 to {last}"):
            tokenprune.patch(build("llava"), method, start_layer=last + 1)
    with pytest.raises(tokenprune.UnsupportedMethod, match="a class token"):
        tokenprune.patch(build("paligemma"), "visionzip", start_layer=0)
    with pytest.raises(tokenprune.BudgetError, match="start_layer"):
        tokenprune.patch(build("llava"), "visionzip", start_layer=-1)


def features_of(model: Any, example: Example) -> Tensor:
    out = model.get_image_features(
        **{k: v for k, v in example.inputs.items() if k in ("pixel_values", "image_grid_thw")}
    )
    return torch.cat(list(out.pooler_output)).flatten(0, -2)


@torch.no_grad()
@pytest.mark.parametrize("name", most_in_full("qwen3_vl", names=("llava", "qwen3_vl", "paligemma")))
def test_divprune(name: str) -> None:
    example, model = prompt(name), build(name)
    x = features_of(model, example).double()
    distance = [[1 - cosine(a, b) for b in x] for a in x]
    n = len(x)
    chosen = [max(range(n), key=lambda i: min(distance[i][j] for j in range(n) if j != i))]
    while len(chosen) < 6:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i][j] for j in chosen)))
    assert kept_by(model, example, "divprune", tokens=6) == [sorted(chosen)]


@torch.no_grad()
def test_cdpruner() -> None:
    """Greedy choice of the largest determinant, with the language model's embeddings and with a text tower's."""
    example, model = prompt("llava"), build("llava")
    x = features_of(model, example).double()
    words = [i for i in range(example.inputs["input_ids"].shape[1]) if i not in example.images[0]]
    text = model.get_input_embeddings()(example.inputs["input_ids"])[0, words].double()
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
            text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 9},
            projection_dim=16,
        )
    )
    project = nn.Sequential(clip.vision_model.post_layernorm, clip.visual_projection)
    question = torch.randn(3, 16)
    hidden, _, _ = tower_states(model, example, -2)
    patches = project(hidden).double()
    for relevance, options in (
        ([sum(cosine(f, t) for t in text) / len(text) for f in x], {}),
        (
            [-sum(cosine(p, t) for t in question.double()) / 3 for p in patches],
            {"question": question, "project": project},
        ),
    ):
        low, high = min(relevance), max(relevance)
        quality = [(r - low) / (high - low) + 1e-6 for r in relevance]
        kernel = torch.tensor(
            [[quality[i] * cosine(x[i], x[j]) * quality[j] for j in range(16)] for i in range(16)]
        ).double()
        chosen: list[int] = []
        while len(chosen) < 6:
            left = [i for i in range(16) if i not in chosen]
            chosen.append(max(left, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
        assert kept_by(model, example, "cdpruner", tokens=6, **options) == [sorted(chosen)]
    with pytest.raises(tokenprune.UnsupportedMethod, match="a text tower"):
        tokenprune.patch(build("qwen2_vl"), "cdpruner", question=question, project=project)
    with pytest.raises(tokenprune.UnsupportedMethod, match="belong together"):
        tokenprune.patch(model, "cdpruner", question=question)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("name", most_in_full("internvl", names=("llava", "internvl", "qwen2_5_vl")))
def test_zero_tprune_ranks_the_towers_graph(name: str, steps: int) -> None:
    """PageRank by matrix powers of the host's own maps; the similarity stage off, as it has tests of its own."""
    example, model = prompt(name), build(name)
    prefix, tiles = CLASS_TOKEN.get(name, 0), []
    rounds = {} if steps == 1 else {"iterations": steps}  # one behind the last layer (section 4.1 of the paper)
    for tile in torch.cat(attention_maps(name, example)).double():
        tokens = tile.shape[-1]
        start = torch.ones(tokens).double()
        if prefix:
            start[0] = tokens**0.5
        heads = [(start / start.sum()) @ torch.linalg.matrix_power(a, steps) for a in tile]
        spread = [((h[prefix:] / h[prefix:].mean()) ** 2).mean() - 1 for h in heads]
        passed = [h for h, s in zip(heads, spread, strict=True) if 0.01 <= s <= 0.7] or heads
        tiles.append((sum(h[prefix:] ** 2 for h in passed) / len(passed)).sqrt().tolist())
    ranks = placeholder_scores(name, tiles)
    keep = len(ranks[0]) // 2
    kept = kept_by(model, example, "zero_tprune", keep=0.5, similarity=0, **rounds)
    assert kept == [best(row, keep) for row in ranks]
    assert kept_by(model, example, "zero_tprune", keep=0.5) != kept_by(model, example, "uniform", keep=0.5)


@torch.no_grad()
@pytest.mark.parametrize("name", most_in_full("llava", names=("llava", "qwen3_vl", "gemma3")))
def test_pool(name: str) -> None:
    """Windows of two by two are averaged in front of the language model, deepstack features with them."""
    example, model = prompt(name), build(name)
    side = math.isqrt(len(example.images[0]))
    cells = [
        [(r + a) * side + c + b for a in (0, 1) for b in (0, 1)] for r in range(0, side, 2) for c in range(0, side, 2)
    ]
    places = example.images[0]

    def change(embeds: Tensor) -> Tensor:
        out = embeds.clone()
        for cell in cells:
            out[0, places[cell[3]]] = embeds[0, [places[i] for i in cell]].mean(0)
        return out

    gone = [places[i] for cell in cells for i in cell[:3]]
    if name == "qwen3_vl":
        layers = model.model.visual.deepstack_merger_list
        for merger in layers:  # of the unpatched model: each cell's mean where its last one is
            merger.register_forward_hook(lambda _, args, out: _cell_means(out, cells))
        expected = by_hand(model, example.inputs, gone, change=change)
        for merger in layers:
            merger._forward_hooks.clear()
    else:
        expected = by_hand(model, example.inputs, gone, change=change)
    with tokenprune.patched(model, "pool"):
        close(generate(model, example.inputs), expected)


def _cell_means(x: Tensor, cells: list[list[int]]) -> Tensor:
    out = x.clone()
    for cell in cells:
        out[cell[3]] = x[cell].mean(0)
    return out
