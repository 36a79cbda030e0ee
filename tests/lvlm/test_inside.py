"""Visual tokens dropped between layers of the language model, against a loop over its layers written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lvlm_zoo import (
    IMAGE,
    KINDS,
    VIDEO,
    Example,
    build,
    close,
    generate,
    language_model,
    left_padded,
    most_in_full,
    prompt,
)
from torch import Tensor, nn

import tokenprune

FAMILIES = [name for name in KINDS if name != "gemma3"]
Choose = Callable[[int, Tensor, dict[str, Any], list[int]], "list[int] | None"]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = len(x) // 2
    return x * cos + torch.cat([-x[half:], x[:half]]) * sin


def scores_of(
    model: Any, layer: int, x: Tensor, given: dict[str, Any], visual: list[int], keys: list[int], rotary: bool
) -> list[float]:
    """Attention of the last of x [L, C] to each of `visual`, softmax over `keys`, mean over heads, token by token."""
    block = language_model(model).layers[layer]
    attention = block.self_attn
    width = attention.head_dim
    x = block.input_layernorm(x)

    def heads(kind: str, token: int) -> list[Tensor]:
        row = getattr(attention, f"{kind}_proj").weight @ x[token]
        bias = getattr(attention, f"{kind}_proj").bias
        row = row if bias is None else row + bias
        parts = list(row.view(-1, width))
        if hasattr(attention, f"{kind}_norm"):
            parts = [getattr(attention, f"{kind}_norm")(part) for part in parts]
        if rotary:
            cos, sin = (table[0, token] for table in given["position_embeddings"])
            parts = [turned(part, cos, sin) for part in parts]
        return parts

    queries = heads("q", len(x) - 1)
    rows = {token: heads("k", token) for token in keys}
    total = dict.fromkeys(visual, 0.0)
    for h, q in enumerate(queries):
        logits = [float(q @ rows[token][h * len(rows[token]) // len(queries)]) * width**-0.5 for token in keys]
        weights = torch.tensor(logits).double().softmax(0).tolist()
        for token, weight in zip(keys, weights, strict=True):
            if token in total:
                total[token] += weight / len(queries)
    return [total[token] for token in visual]


@torch.no_grad()
def layer_by_layer(
    name: str,
    example: Example,
    stages: dict[int, Callable[[Any, Tensor, dict[str, Any], list[int]], list[int]]],
    scored: int,
    tokens: int = 4,
) -> tuple[Tensor, Tensor, dict[int, list[int]]]:
    """(new tokens, scores, what is left behind each stage): at layer `place` + `scored` of the prompt's forward,
    stages[place] says which of the visual tokens that are left stay. Without a cache, in eager mode."""
    model: Any = build(name, "eager")
    text, inputs = language_model(model), dict(example.inputs)
    images = [place for image in example.images for place in image]
    first: dict[str, Any] = {}
    left: dict[int, list[int]] = {}
    new, all_scores = [], []
    for step in range(tokens):
        hook = text.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: first.update(kwargs, hidden=args[0]), with_kwargs=True
        )
        model(**inputs, use_cache=False)
        hook.remove()
        length = first["hidden"].shape[1]
        here, x = list(range(length)), first["hidden"][0]
        visual = list(images)
        for index, layer in enumerate(text.layers):
            if index in stages and scored == 0:
                given = {**first, "position_embeddings": tuple(t[:, here] for t in first["position_embeddings"])}
                if step == 0:
                    left[index] = _stage(model, stages[index], x, given, here, visual)
            if index in stages:
                visual = left[index]
                stay = [i for i, token in enumerate(here) if token in visual or token not in images]
                here, x = [here[i] for i in stay], x[stay]
            given = {**first, "position_embeddings": tuple(t[:, here] for t in first["position_embeddings"])}
            if index + 1 in stages and scored == -1 and step == 0:
                left[index + 1] = _stage(model, stages[index + 1], x, given, here, visual)
            mask = first["attention_mask"][:, :, here][..., here]
            x = layer(x[None], attention_mask=mask, position_embeddings=given["position_embeddings"])[0]
            deepstack = getattr(model.model, "visual", None)
            if name == "qwen3_vl" and index < 2:
                assert deepstack is not None
                pixels = deepstack(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).deepstack_features[index]
                x[images] += pixels
        logits = model.lm_head(text.norm(x[-1:]))
        logits[:, [IMAGE, VIDEO]] = float("-inf")
        all_scores.append(logits.nan_to_num(0, 0, 0))
        new.append(logits.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new[-1]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for key, kind in (("mm_token_type_ids", 0), ("token_type_ids", 1)):
            if key in inputs:
                inputs[key] = nn.functional.pad(inputs[key], (0, 1), value=kind)
    return torch.cat(new, 1), torch.stack(all_scores), left


def _stage(model: Any, stage: Any, x: Tensor, given: dict[str, Any], here: list[int], visual: list[int]) -> list[int]:
    places = [here.index(token) for token in visual]
    return [visual[i] for i in stage(model, x, given, places)]


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def feather_stages(name: str, example: Example, rate: float, stride: int, rotary: bool = False) -> Any:
    images = [place for image in example.images for place in image]
    sure = set()
    for image, (rows, columns) in zip(example.images, grids(name, example), strict=True):
        for i, place in enumerate(image):
            on_grid = (
                i % stride**2 == 0 if rows is None else (i // columns) % stride == 0 and (i % columns) % stride == 0
            )
            if on_grid:
                sure.add(place)

    def first(model: Any, x: Tensor, given: dict[str, Any], places: list[int]) -> list[int]:
        scores = scores_of(model, PLACES.get(name, (1, 2))[0] - 1, x, given, places, places, rotary)
        chosen = best(scores, int(rate * len(images)))
        return sorted({*chosen, *(i for i, place in enumerate(images) if place in sure)})

    def second(model: Any, x: Tensor, given: dict[str, Any], places: list[int]) -> list[int]:
        scores = scores_of(model, PLACES.get(name, (1, 2))[1] - 1, x, given, places, places, rotary)
        return best(scores, int(rate**2 * len(places)))

    one, two = PLACES.get(name, (1, 2))
    return {one: first, two: second}


def grids(name: str, example: Example) -> list[tuple[Any, Any]]:
    if name in ("llava_next", "onevision"):
        return [(None, None)] * len(example.images)
    if name.startswith("qwen"):
        return [(int(rows) // 2, int(columns) // 2) for _, rows, columns in example.inputs["image_grid_thw"]]
    return [(int(len(image) ** 0.5),) * 2 for image in example.images]


PLACES = {"qwen3_vl": (2, 3)}  # behind the layers that get image features


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", most_in_full("llava", "qwen2_vl", "qwen3_vl", names=FAMILIES))
def test_feather(name: str, attention: str) -> None:
    example = prompt(name)
    tokens, scores, left = layer_by_layer(name, example, feather_stages(name, example, 0.6, 2), -1)
    assert 0 < len(left[max(left)]) < len(left[min(left)])
    model = build(name, attention)
    with (
        tokenprune.patched(model, "feather", rate=0.6, stride=2, places=PLACES.get(name)),
        tokenprune.record(model) as seen,
    ):
        close(generate(model, example.inputs), (tokens, scores))
    images = [place for image in example.images for place in image]
    for place, record in zip(sorted(left), seen.forwards[0].places, strict=True):
        assert record.kept[0].tolist() == [images.index(token) for token in left[place]]


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", most_in_full("llava", "qwen2_vl", names=FAMILIES))
def test_fastv(name: str, attention: str) -> None:
    example = prompt(name)
    total = sum(len(image) for image in example.images)

    def stage(model: Any, x: Tensor, given: dict[str, Any], places: list[int]) -> list[int]:
        return best(scores_of(model, 2, x, given, places, list(range(len(x))), rotary=True), round(0.25 * total))

    tokens, scores, _ = layer_by_layer(name, example, {3: stage}, -1)
    model = build(name, attention)
    with tokenprune.patched(model, "fastv", rate=0.25):
        close(generate(model, example.inputs), (tokens, scores))


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", most_in_full("llava", "qwen2_5_vl", names=FAMILIES))
def test_pyramid_drop(name: str, attention: str) -> None:
    example = prompt(name)
    total = sum(len(image) for image in example.images)
    places = (2, 3) if name == "qwen3_vl" else (1, 2, 3)

    def stage(number: int, layer: int) -> Any:
        def choose(model: Any, x: Tensor, given: dict[str, Any], at: list[int]) -> list[int]:
            keys = list(range(len(x)))
            return best(scores_of(model, layer, x, given, at, keys, rotary=True), int(0.5**number * total))

        return choose

    stages = {layer: stage(number + 1, layer) for number, layer in enumerate(places)}
    tokens, scores, _ = layer_by_layer(name, example, stages, 0)
    model = build(name, attention)
    with tokenprune.patched(model, "pyramid_drop", places=places):
        close(generate(model, example.inputs), (tokens, scores))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", most_in_full("llava", names=FAMILIES))
def test_batches_keep_all_and_unpatch(name: str, attention: str) -> None:
    """Each layer's cache is as long as the tokens that it saw; samples of a batch do not see each other."""
    model, example = build(name, attention), prompt(name)
    places = PLACES.get(name)
    before = generate(model, example.inputs)
    every = sum(len(image) for image in example.images) // len(example.images)
    with tokenprune.patched(model, "feather", tokens=every, places=places):
        after = generate(model, example.inputs)
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
    more = 2 if name not in ("idefics3", "smolvlm") else 1
    examples = [prompt(name, 0).inputs, prompt(name, 1, text=9, images=more, size=1).inputs]
    with tokenprune.patched(model, "feather", rate=0.6, stride=2, places=places):
        singles = [generate(model, one) for one in examples]
        together = generate(model, left_padded(examples))
        beams = [generate(model, one, num_beams=2)[0] for one in examples]
        assert torch.equal(generate(model, left_padded(examples), num_beams=2)[0], torch.cat(beams))
        out = model(**example.inputs, use_cache=True)
        images = [place for image in example.images for place in image]
        gone = len(images) - tokenprune.report(model).to_dict()["places"][0]["tokens_out"] * len(example.images)
        lengths = [out.past_key_values.get_seq_length(layer) for layer in range(4)]
        assert lengths[0] == example.inputs["input_ids"].shape[1]
        if len(example.images) == 1:
            assert lengths[3] == lengths[0] - gone
        assert out.logits.shape[1] == lengths[0]
    for row, single in enumerate(singles):
        close((together[0][row : row + 1], together[1][:, row : row + 1]), single)
    after = generate(model, example.inputs)
    assert torch.equal(before[1], after[1])
    assert not any(
        getattr(h, "__module__", "").startswith("tokenprune")
        for m in model.modules()
        for h in m._forward_pre_hooks.values()
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_conversation_goes_on(attention: str) -> None:
    model, example = build("llava", attention), prompt("llava")
    with tokenprune.patched(model, "pyramid_drop"):
        cache = transformers.DynamicCache()
        new, _ = generate(model, example.inputs, 3, past_key_values=cache)
        copied = copy.deepcopy(cache)
        ids = torch.cat([example.inputs["input_ids"], new, torch.tensor([[31, 32, 33, 34]])], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        turn = generate(model, dict(more), 3, past_key_values=cache)
        # token by token on top of the same cache
        prompt_length = example.inputs["input_ids"].shape[1]
        logits = None
        for place in range(prompt_length + 2, ids.shape[1]):
            logits = model(input_ids=ids[:, place : place + 1], past_key_values=copied).logits[:, -1]
        assert logits is not None
        logits[:, [IMAGE, VIDEO]] = 0
        assert (turn[1][0] - logits).abs().max() <= 2e-6 * logits.abs().max()


def test_projections_are_called() -> None:
    """A quantised projection has no weight to read."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, example = build("llava"), prompt("llava")
    with tokenprune.patched(model, "feather", rate=0.5):
        expected = generate(model, example.inputs)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj, layer.self_attn.k_proj = (
            Wrapped(layer.self_attn.q_proj),
            Wrapped(layer.self_attn.k_proj),
        )
    with tokenprune.patched(model, "feather", rate=0.5):
        close(generate(model, example.inputs), expected)


def test_training() -> None:
    model, example = build("llava"), prompt("llava")
    labels = example.inputs["input_ids"].clone()
    labels[labels == IMAGE] = -100
    with tokenprune.patched(model, "fastv", rate=0.25):
        out = model(**example.inputs, labels=labels)
        by_hand = nn.functional.cross_entropy(out.logits[0, :-1], labels[0, 1:])
        assert torch.allclose(out.loss, by_hand)
        out.loss.backward()
        assert all(p.grad is not None for p in model.model.language_model.layers[-1].parameters())
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(tokenprune.UnsupportedModel, match="gradient checkpointing"):
            model(**example.inputs)


def test_what_is_refused() -> None:
    model, example = build("llava"), prompt("llava")
    with tokenprune.patched(model, "feather"):
        with pytest.raises(tokenprune.UnsupportedModel, match="static cache"):
            generate(model, example.inputs, cache_implementation="static", disable_compile=True)
        cache = model(input_ids=torch.tensor([[1, 5]]), use_cache=True).past_key_values
        with pytest.raises(tokenprune.UnsupportedModel, match="on top of a cache"):
            model(**{**example.inputs, "attention_mask": None}, past_key_values=cache)
    with (
        tokenprune.patched(model, "feather", tokens=17),
        pytest.raises(tokenprune.BudgetError, match="at most tokens=16"),
    ):
        model(**example.inputs)
    with (
        tokenprune.patched(model, "fastv", rate=0.99),
        pytest.raises(tokenprune.BudgetError, match=r"rate=0\.99 of 16 tokens drops none"),
    ):
        model(**example.inputs)
    for name, method, match in (
        ("gemma3", {"method": "fastv"}, "caches differ"),
        ("llava", {"method": "fastv", "positions": "reindex"}, "positions="),
        ("llava", {"method": "fastv", "place": 0}, "place=1"),
        ("llava", {"method": "feather", "places": (2,)}, "two layers"),
    ):
        with pytest.raises(tokenprune.UnsupportedMethod, match=match):
            tokenprune.patch(build(name), **method)
    deep = build("qwen3_vl")
    with tokenprune.patched(deep, "feather"), pytest.raises(tokenprune.UnsupportedModel, match="first 2 layers"):
        deep(**prompt("qwen3_vl").inputs)
    assert VIDEO
