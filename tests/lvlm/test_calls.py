"""Every way of calling a vision-language model is right under a patch, or refused with the reason."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from lvlm_zoo import (
    CLIP,
    IMAGE,
    KINDS,
    LLAMA,
    VIDEO,
    build,
    by_hand,
    close,
    evenly_gone,
    generate,
    language_model,
    left_padded,
    most_in_full,
    narrowed,
    prompt,
)
from torch import Tensor, nn

import tokenprune
from tokenprune import registry


def cached(model: Any, inputs: dict[str, Tensor], cache: Any = None, tokens: int = 3) -> tuple[Tensor, Tensor]:
    return generate(model, inputs, tokens, past_key_values=cache if cache is not None else transformers.DynamicCache())


@pytest.mark.parametrize("name", most_in_full("llava", "qwen2_vl", "gemma3"))
def test_a_conversation_goes_on_in_its_cache(name: str) -> None:
    """Only what is new is run, and it is as if the whole conversation had been pruned anew."""
    model, example = build(name), prompt(name)
    text = language_model(model)
    with tokenprune.patched(model, "uniform", keep=0.25):
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        new, _ = cached(model, example.inputs, cache)
        copied = copy.deepcopy(pickle.loads(pickle.dumps(cache)))
        ids = torch.cat([example.inputs["input_ids"], new, torch.tensor([[31, 32, 33, 34]])], 1)
        more = {**example.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kind = KINDS[name].types
        if kind is not None:
            grown = ids.shape[1] - example.inputs[kind[0]].shape[1]
            more[kind[0]] = nn.functional.pad(example.inputs[kind[0]], (0, grown), value=int(name == "paligemma"))
        second = {k: v for k, v in more.items() if k not in ("pixel_values", "image_sizes")}
        anew = generate(model, more, 3)
        lengths: list[int] = []
        hook = text.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        close(cached(model, dict(second), cache), anew)
        assert lengths == [5, 1, 1]  # the last token of the first turn had not been run
        close(cached(model, dict(second), copied), anew)
        hook.remove()
    assert (generate(model, more, 3)[1] - anew[1]).abs().max() > 1e-3 * anew[1].abs().max()


# Of PaliGemma all images stand in front, of Idefics3 and SmolVLM a sample's are one tensor, and Gemma 3 itself does not
# give the same for an image on top of a cache.
ON_TOP = [name for name in KINDS if name not in ("paligemma", "idefics3", "smolvlm", "gemma3")]


@pytest.mark.parametrize("name", most_in_full("llava", names=ON_TOP))
def test_a_second_image_in_the_second_turn(name: str) -> None:
    model = build(name)
    both = prompt(name, images=2)
    first = prompt(name, images=1)
    length = both.images[KINDS[name].tiles][0] - len(KINDS[name].around(0)) // 2
    turn = {k: v[:, :length] if v.shape[:2] == both.inputs["input_ids"].shape else v for k, v in both.inputs.items()}
    count = {k: v.shape[0] // 2 for k, v in both.inputs.items() if k in ("image_sizes", "image_grid_thw")}
    pixels = both.inputs["pixel_values"]
    if "image_grid_thw" in both.inputs:
        half = int(both.inputs["image_grid_thw"][0].prod())
    else:
        half = len(pixels) // 2
    turn |= {k: both.inputs[k][:n] for k, n in count.items()} | {"pixel_values": pixels[:half]}
    assert first.inputs.keys() == turn.keys()
    with tokenprune.patched(model, "uniform", keep=0.5):
        whole = model(**both.inputs).logits[:, -1]
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        out = model(**turn, past_key_values=cache, use_cache=True)
        positions = _positions(model, both.inputs)
        rest = {k: v[:, length:] for k, v in both.inputs.items() if v.shape[:2] == both.inputs["input_ids"].shape}
        rest |= {k: both.inputs[k][n:] for k, n in count.items()} | {"pixel_values": pixels[half:]}
        rest["attention_mask"] = both.inputs["attention_mask"]
        if positions is not None:
            rest["position_ids"] = positions[..., length:]
        again = model(**rest, past_key_values=out.past_key_values).logits[:, -1]
    assert (whole - again).abs().max() <= 2e-6 * whole.abs().max()


def _positions(model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    if "image_grid_thw" not in inputs:
        return None
    return model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"])[0]


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.full)])
def test_a_static_cache(name: str) -> None:
    model = build(name)
    batch = left_padded([prompt(name).inputs, prompt(name, 1, text=8).inputs])
    with tokenprune.patched(model, "uniform", keep=0.25):
        expected = generate(model, batch)
        close(generate(model, batch, cache_implementation="static", disable_compile=True), expected)


def test_a_static_cache_is_refused_where_masks_are_made_before() -> None:
    model = build("gemma3")
    with (
        tokenprune.patched(model, "uniform", keep=0.25),
        pytest.raises(tokenprune.UnsupportedModel, match="static"),
    ):
        generate(model, prompt("gemma3").inputs, cache_implementation="static", disable_compile=True)


def test_beyond_a_sliding_window_is_refused() -> None:
    """It counts the entries of a cache, fewer than the tokens: of a prompt, and where an answer gets there."""
    model, example = build("gemma3"), prompt("gemma3", text=45)
    length = example.inputs["input_ids"].shape[1]
    assert length < 64
    with tokenprune.patched(model, "uniform", keep=0.25):
        generate(model, example.inputs, 65 - length)
        with pytest.raises(tokenprune.UnsupportedModel, match="65 tokens"):
            generate(model, example.inputs, 66 - length)
        with pytest.raises(tokenprune.UnsupportedModel, match="sliding window of 64"):
            model(**prompt("gemma3", text=60).inputs)
    text = {**LLAMA, "model_type": "mistral", "sliding_window": 16}  # which names no kinds of layers
    config = transformers.LlavaConfig(vision_config=CLIP, text_config=text, image_token_index=IMAGE)
    windowed = transformers.LlavaForConditionalGeneration(config).eval()
    with (
        tokenprune.patched(windowed, "uniform", keep=0.25),
        pytest.raises(tokenprune.UnsupportedModel, match="sliding window of 16"),
    ):
        windowed(**prompt("llava").inputs)
    with pytest.raises(tokenprune.UnsupportedMethod, match="caches differ"):
        tokenprune.patch(windowed, "feather", keep=0.25)


def test_prompt_lookup() -> None:
    model, example = build("llava"), prompt("llava", text=12)
    with tokenprune.patched(model, "uniform", keep=0.25):
        expected = generate(model, example.inputs, 8)
        close(generate(model, example.inputs, 8, prompt_lookup_num_tokens=3), expected)
    with tokenprune.patched(model, "uniform", keep=0.25, positions="reindex"):
        expected = generate(model, example.inputs, 8)
        close(generate(model, example.inputs, 8, prompt_lookup_num_tokens=3), expected)


CHOSEN_BY_TEXT: list[tuple[str, dict[str, Any]]] = [
    ("cdpruner", {"tokens": 7}),
    ("feather", {"keep": 0.25}),
    ("fastv", {"keep": 0.5, "place": 2}),
    ("pyramid_drop", {"rate": 0.5}),
]


@pytest.mark.parametrize(("method", "options"), CHOSEN_BY_TEXT)
def test_candidates_of_prompt_lookup_are_no_part_of_the_question(method: str, options: dict[str, Any]) -> None:
    """The prompt's own forward brings candidates, which are turned down; tokens are chosen as without them."""
    model, differ = build("llava"), 0
    lengths: list[int] = []
    language_model(model).register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for seed in range(4):
        example = prompt("llava", seed, text=12)
        ids = example.inputs["input_ids"]
        ids[0, -8:] = torch.tensor([40 + seed, 41, 42, 43, 44, 45, 40 + seed, 41])
        longer = torch.cat([ids, ids[:, -6:-3]], 1)
        grown = {**example.inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
        with tokenprune.patched(model, method, **options):
            expected = generate(model, example.inputs, 6)
            lengths.clear()
            close(generate(model, example.inputs, 6, prompt_lookup_num_tokens=3), expected)
            assert lengths[0] == ids.shape[1] + 3
            kept = []
            for inputs in (example.inputs, grown):
                with tokenprune.record(model) as recording:
                    model(**inputs)
                kept.append([place.kept.tolist() for place in recording.forwards[0].places])
            differ += kept[0] != kept[1]
            with tokenprune.record(model) as recording:
                generate(model, example.inputs, 6, prompt_lookup_num_tokens=3)
            assert [place.kept.tolist() for place in recording.forwards[0].places] == kept[0]
        with tokenprune.patched(model.model, method, **options):
            close(generate(model, example.inputs, 6, prompt_lookup_num_tokens=3), expected)
    assert differ  # with the candidates in the question other tokens would be chosen


def test_a_prompt_is_not_cropped_into_where_tokens_are_missing() -> None:
    model, example = build("llava"), prompt("llava", text=12)
    with tokenprune.patched(model, "uniform", keep=0.25):
        cache = model(**example.inputs, use_cache=True).past_key_values
        with pytest.raises(tokenprune.UnsupportedModel, match="cannot be cropped"):
            cache.crop(1 - cache.get_seq_length())
    with tokenprune.patched(model, "feather", keep=0.25):
        cache = model(**example.inputs, use_cache=True).past_key_values
        cache.crop(-3)
        with pytest.raises(tokenprune.UnsupportedModel, match="assisted generation"):
            model(input_ids=example.inputs["input_ids"][:, -3:], past_key_values=cache)


def test_a_cache_that_goes_on_without_its_patch() -> None:
    """Refused where that would be wrong: with padding in it, or with positions counted anew."""
    model = build("llava")
    one, more = prompt("llava"), prompt("llava", 1, images=2, text=9)
    for batch, options, right in (
        (left_padded([one.inputs]), {}, True),
        (left_padded([one.inputs]), {"positions": "reindex"}, False),
        (left_padded([one.inputs, more.inputs]), {}, False),
    ):
        rows = len(batch["input_ids"])
        turn = {"input_ids": torch.tensor([[31, 32, 33]] * rows)}
        turn["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(rows, 3, dtype=torch.long)], 1)
        with torch.no_grad(), tokenprune.patched(model, "uniform", keep=0.25, **options):
            cache = model(**batch, past_key_values=transformers.DynamicCache()).past_key_values
            other, third = copy.deepcopy(cache), copy.deepcopy(cache)
            expected = model(**turn, past_key_values=cache).logits
        with torch.no_grad(), tokenprune.patched(model, "feather", keep=0.25):
            if right:
                assert torch.allclose(model(**turn, past_key_values=other).logits, expected, rtol=1e-5)
            else:
                with pytest.raises(tokenprune.UnsupportedModel, match="goes on without it"):
                    model(**turn, past_key_values=other)
        with torch.no_grad():
            if right:
                assert torch.allclose(model(**turn, past_key_values=third).logits, expected, rtol=1e-5)
            else:
                with pytest.raises(tokenprune.UnsupportedModel, match="goes on without it"):
                    model(**turn, past_key_values=third)


def test_hooks_that_move_outputs_between_devices() -> None:
    model, example = build("llava"), prompt("llava")
    with tokenprune.patched(model, "top_k", keep=0.5):
        expected = generate(model, example.inputs)
        add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        close(generate(model, example.inputs), expected)


def test_a_pixtral_tower_is_refused() -> None:
    model = build("llava")
    model.model.vision_tower.__class__ = type("PixtralVisionModel", (type(model.model.vision_tower),), {})
    with pytest.raises(tokenprune.UnsupportedModel, match="Pixtral"):
        tokenprune.patch(model, "uniform", keep=0.5)


@pytest.mark.parametrize("name", most_in_full("llava", "qwen2_vl"))
def test_embeddings_instead_of_ids(name: str) -> None:
    """With the placeholders' embeddings and pixels it is the same; without pixels nobody can tell what is an image."""
    model, example = build(name), prompt(name)
    embeds = model.get_input_embeddings()(example.inputs["input_ids"])
    inputs = {k: v for k, v in example.inputs.items() if k != "input_ids"}
    with tokenprune.patched(model, "uniform", keep=0.25):
        expected = model(**example.inputs).logits
        if "image_grid_thw" in inputs:
            inputs["position_ids"] = _positions(model, example.inputs)
        got = model(**inputs, inputs_embeds=embeds).logits
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()
        with pytest.raises(tokenprune.UnsupportedModel, match="inputs_embeds alone"):
            model(inputs_embeds=embeds)


def test_chunked_prefill_is_refused() -> None:
    model, example = build("llava"), prompt("llava")
    with tokenprune.patched(model, "uniform", keep=0.25), pytest.raises(tokenprune.UnsupportedModel, match="chunks"):
        generate(model, example.inputs, prefill_chunk_size=8)


def test_features_made_beforehand() -> None:
    model, example = build("llava"), prompt("llava")
    pixels = example.inputs["pixel_values"]
    text = {k: v for k, v in example.inputs.items() if k != "pixel_values"}
    stale = model.get_image_features(pixels, return_dict=True)
    with tokenprune.patched(model, "top_k", keep=0.25):
        expected = model(**example.inputs).logits
        made = model.get_image_features(pixels, return_dict=True)
        other = model.get_image_features(torch.randn(1, 3, 56, 56), return_dict=True)
        assert other is not made
        for _ in range(2):
            assert torch.equal(model(**text, mm_encoder_outputs={"image": made}).logits, expected)
        with pytest.raises(tokenprune.UnsupportedModel, match="without this patch"):
            model(**text, mm_encoder_outputs={"image": stale})


@pytest.mark.parametrize("name", most_in_full("llava", "qwen3_vl", "gemma3"))
def test_labels_and_logits_of_the_prompts_length(name: str) -> None:
    """The loss is that of the pruned sequence by hand, and gradients reach the tower."""
    model, example = build(name), prompt(name)
    gone = evenly_gone(example, 0.25)
    ids = example.inputs["input_ids"]
    keep = [i for i in range(ids.shape[1]) if i not in gone]
    seen: dict[str, Any] = {}
    hook = language_model(model).register_forward_pre_hook(lambda _, a, k: seen.update(k), with_kwargs=True)
    model(**example.inputs)
    hook.remove()
    with torch.no_grad():
        hidden = language_model(model)(**narrowed(seen, keep), use_cache=False).last_hidden_state
        short = model.lm_head(hidden)
    # a token that is left out predicts nothing and is predicted by nothing
    loss = nn.functional.cross_entropy(short[0, :-1], ids[0, keep][1:])
    with tokenprune.patched(model, "uniform", keep=0.25):
        labels = ids.clone()
        out = model(**example.inputs, labels=labels)
        assert torch.equal(labels, ids)
        assert out.logits.shape[:2] == ids.shape
        assert (out.logits[:, keep] - short).abs().max() <= 2e-6 * short.abs().max()
        last = [max(i for i, k in enumerate(keep) if k <= place or i == 0) for place in range(ids.shape[1])]
        assert torch.equal(out.logits, out.logits[:, keep][:, last])
        assert abs(out.loss.item() - loss.item()) <= 1e-5 * loss.item()
        model.train()
        model(**example.inputs, labels=labels).loss.backward()
        model.eval()
    tower = (
        getattr(model.model, "vision_tower", None) or getattr(model.model, "visual", None) or model.model.vision_model
    )
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tower.parameters())


@pytest.mark.parametrize("method", ["uniform", "feather"])
def test_labels_that_the_patch_does_not_see_are_refused(method: str) -> None:
    """Those of the model around the one that is patched, which would count tokens that were left out."""
    model, example = build("llava"), prompt("llava")
    labels = example.inputs["input_ids"].clone()
    with tokenprune.patched(model, method, keep=0.25):
        expected = model(**example.inputs, labels=labels)
    with tokenprune.patched(model.model, method, keep=0.25):
        for asked in (
            lambda: model(**example.inputs, labels=labels),
            lambda: model.train()(**example.inputs, labels=labels),
        ):
            with pytest.raises(tokenprune.UnsupportedModel, match=r"patch\(model, .*LlavaForConditionalGeneration"):
                asked()
        model.eval()
        got = model(**example.inputs)
        assert (got.logits - expected.logits).abs().max() <= 2e-6 * expected.logits.abs().max()
        text = {k: v for k, v in example.inputs.items() if k != "pixel_values"}
        text["input_ids"] = torch.tensor([[1, 5, 6, 7]])
        text["attention_mask"] = torch.ones_like(text["input_ids"])
        assert model(**text, labels=text["input_ids"]).loss.isfinite()


def test_right_padding_in_training() -> None:
    model = build("qwen2_vl")
    one, two = prompt("qwen2_vl").inputs, prompt("qwen2_vl", 1, text=9, size=1).inputs
    more = two["input_ids"].shape[1] - one["input_ids"].shape[1]
    sides = ((one, (0, max(0, more))), (two, (0, max(0, -more))))
    keys = ("input_ids", "attention_mask", "mm_token_type_ids")
    batch = {k: torch.cat([nn.functional.pad(x[k], side) if k in keys else x[k] for x, side in sides]) for k in one}
    with tokenprune.patched(model, "uniform", keep=0.25):
        together = model(**batch).logits
        for row, single in enumerate((one, two)):
            alone = model(**single).logits[0]
            assert (together[row, : len(alone)] - alone).abs().max() <= 2e-6 * alone.abs().max()


@pytest.mark.parametrize("name", most_in_full("qwen2_vl", names=("qwen2_vl", "qwen2_5_vl", "qwen3_vl")))
def test_a_video_has_a_budget_of_its_own(name: str) -> None:
    model = build(name)
    patch = 16 if name == "qwen3_vl" else 14
    torch.manual_seed(5)
    frames = [[VIDEO] * 8] * 2 if name == "qwen3_vl" else [[VIDEO] * 16]  # there each frame has a place of its own
    ids = [1, 5]
    for frame in frames:
        ids += [112, *frame, 113]
    tokens = torch.tensor([[*ids, 7, 8, 9]])
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == VIDEO).long() * 2,
        "pixel_values_videos": torch.randn(64, 6 * patch * patch),
        "video_grid_thw": torch.tensor([[2, 4, 8]]),
    }
    places = (tokens[0] == VIDEO).nonzero().flatten().tolist()
    gone = [p for i, p in enumerate(places) if i not in {(2 * j + 1) * 16 // 8 for j in range(4)}]
    expected = by_hand(model, inputs, gone)
    with tokenprune.patched(model, "uniform", tokens=4):
        close(generate(model, inputs), expected)


def test_a_video_is_refused_where_frames_are_pooled() -> None:
    model = build("onevision")
    ids = torch.tensor([[1, *[VIDEO] * 9, 7, 8]])
    with tokenprune.patched(model, "uniform", keep=0.5), pytest.raises(tokenprune.UnsupportedModel, match="video"):
        generate(model, {"input_ids": ids, "pixel_values_videos": torch.randn(1, 2, 3, 56, 56)})


def test_threads_and_copies() -> None:
    model, examples = build("llava"), [prompt("llava", seed, text=4 + seed).inputs for seed in range(3)]
    tokenprune.patch(model, "top_k", keep=0.25)
    again = pickle.loads(pickle.dumps(model))  # behind a forward, transformers' own hooks do not pickle
    expected = [model(**one).logits for one in examples]
    twin = copy.deepcopy(model)
    got: dict[int, bool] = {}

    def run(index: int) -> None:
        got[index] = all(torch.equal(model(**examples[index]).logits, expected[index]) for _ in range(3))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {0: True, 1: True, 2: True}
    tokenprune.unpatch(model)
    whole = model(**examples[0]).logits
    for other in (twin, again):
        assert torch.equal(other(**examples[0]).logits, expected[0])
        tokenprune.unpatch(other)
        assert torch.equal(other(**examples[0]).logits, whole)


def test_an_error_in_the_middle_leaves_the_model_usable() -> None:
    model, example = build("llava"), prompt("llava")
    tokenprune.patch(model, "top_k", keep=0.25)
    expected = model(**example.inputs).logits

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    hook = model.model.language_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(**example.inputs, labels=example.inputs["input_ids"])
    hook.remove()
    longer = prompt("llava", text=9).inputs
    assert model.model(**longer).last_hidden_state.shape[1] == longer["input_ids"].shape[1]
    text = {"input_ids": torch.tensor([[1, 5, 6]])}
    tokenprune.unpatch(model)
    plain = model(**text).logits
    tokenprune.patch(model, "top_k", keep=0.25)
    assert torch.equal(model(**text).logits, plain)
    assert torch.equal(model(**example.inputs).logits, expected)


def test_a_patch_of_the_tower_stays_under_one_of_the_whole() -> None:
    model, example = build("llava"), prompt("llava")
    tower = model.model.vision_tower
    whole = model(**example.inputs).logits
    tokenprune.patch(tower, "tome", r=2)
    inside = model(**example.inputs).logits
    tokenprune.patch(model, "uniform", keep=0.5)
    assert tokenprune.report(tower).to_dict()["method"] == "tome"
    both = model(**example.inputs).logits
    tokenprune.patch(model, "random", keep=0.5)  # takes the place of the one, and leaves the other
    tokenprune.patch(model, "uniform", keep=0.5)
    assert torch.equal(model(**example.inputs).logits, both)
    tokenprune.unpatch(tower)
    assert not torch.equal(model(**example.inputs).logits, both)
    tokenprune.patch(tower, "tome", r=2)
    assert torch.equal(model(**example.inputs).logits, both)
    with (
        tokenprune.patched(model, "top_k", keep=0.5),
        pytest.raises(tokenprune.UnsupportedModel, match="patched itself"),
    ):
        model(**example.inputs)
    assert torch.equal(model(**example.inputs).logits, both)
    with pytest.raises(tokenprune.UnsupportedMethod):
        tokenprune.patch(model, "tome", keep=0.5)
    assert torch.equal(model(**example.inputs).logits, both)  # what is refused changes neither
    tokenprune.unpatch(model)
    assert torch.equal(model(**example.inputs).logits, whole)
    assert not torch.equal(inside, both)


@pytest.mark.parametrize("name", most_in_full("llava", names=("llava", "qwen2_vl")))
def test_adapters_on_the_tower_are_scored(name: str) -> None:
    """Those that were added after the patch, and once they are merged the projection itself."""
    model, example = build(name), prompt(name)
    tokenprune.patch(model, "top_k", keep=0.5)
    config = peft.LoraConfig(r=4, target_modules=r".*(q_proj|k_proj|attn\.qkv)", init_lora_weights=False)
    torch.manual_seed(0)
    wrapped: Any = peft.get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    added = generate(wrapped, example.inputs)
    tokenprune.unpatch(model)
    with tokenprune.patched(model, "top_k", keep=0.5):
        close(added, generate(model, example.inputs))
        merged = wrapped.merge_and_unload()
        behind = generate(merged, example.inputs)
    with tokenprune.patched(merged, "top_k", keep=0.5):
        close(behind, generate(merged, example.inputs))


def test_two_models_on_one_tower() -> None:
    """What is known of its images is kept for the patch of each."""
    first, second, example = build("llava"), build("llava"), prompt("llava")
    second.model.language_model = copy.deepcopy(first.model.language_model)
    methods: list[tuple[Any, str]] = [(first, "top_k"), (second, "fopru")]
    expected = []
    for model, method in methods:
        with tokenprune.patched(model, method, tokens=5):
            expected.append(generate(model, example.inputs))
    assert not torch.equal(expected[0][1], expected[1][1])
    second.model.vision_tower = first.model.vision_tower
    for model, method in methods:
        tokenprune.patch(model, method, tokens=5)
    for (model, _), one in zip(methods, expected, strict=True):
        close(generate(model, example.inputs), one)


def test_what_there_is() -> None:
    everywhere = {"top_k", "random", "uniform", "fopru", "visionzip", "divprune", "cdpruner", "zero_tprune", "pool"}
    inside = {"feather", "fastv", "pyramid_drop"}
    for name, more in (("llava", {"prumerge", *inside}), ("qwen3_vl", inside), ("gemma3", set())):
        found = {method.name for method in tokenprune.methods(build(name))}
        found = {one for one in found if registry._METHODS[one].__module__.startswith("tokenprune.methods")}
        assert found - {"zero_tprune_uni"} == everywhere | more
    model = build("llava")
    tokenprune.patch(model, tokens=8)
    assert tokenprune.report(model).to_dict()["method"] == "fopru"
    assert "solved at the first prompt" in str(tokenprune.report(model))
    model(**prompt("llava").inputs)
    assert tokenprune.report(model).to_dict()["places"] == [
        {"name": "after the tower", "tokens_in": 16, "tokens_out": 8}
    ]


def test_wrong_use() -> None:
    text_only = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
        )
    )
    with pytest.raises(tokenprune.UnsupportedModel, match="no adapter knows LlamaForCausalLM"):
        tokenprune.patch(text_only, "top_k", tokens=64)
    model, example = build("llava"), prompt("llava")
    with (
        tokenprune.patched(model, "uniform", tokens=17),
        pytest.raises(tokenprune.BudgetError, match="at most tokens=16"),
    ):
        generate(model, example.inputs)
    with tokenprune.patched(model, "uniform", keep=0.99), pytest.raises(tokenprune.BudgetError, match="drops none"):
        model(**example.inputs)
    for wrong, error, match in (
        ({"method": "tome", "keep": 0.5}, tokenprune.UnsupportedMethod, r"model\.model\.vision_tower"),
        ({"method": "uniform", "keep": 0.5, "positions": "new"}, tokenprune.UnsupportedMethod, "'reindex'"),
        ({"method": "uniform", "keep": 0.5, "steps": {}}, tokenprune.UnsupportedMethod, "steps"),
        ({"method": "uniform", "places": (1,)}, tokenprune.BudgetError, "behind the tower"),
        ({"method": "uniform", "schedule": {1: 0.5}}, tokenprune.BudgetError, "behind the tower"),
        ({"method": "uniform", "tokens": 0}, tokenprune.BudgetError, "whole number"),
    ):
        with pytest.raises(error, match=match):
            tokenprune.patch(model, **wrong)
    with pytest.raises(tokenprune.UnsupportedMethod, match="positions="):
        tokenprune.patch(model.model.vision_tower, "top_k", keep=0.5, positions="reindex")
    with pytest.raises(tokenprune.UnsupportedModel, match="nothing here is patched"):
        tokenprune.report(model)
