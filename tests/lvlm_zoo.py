"""One tiny vision-language model of each family of transformers, its prompts, and a generation loop written by hand.

Nothing here is ours: the loop prunes what the unpatched model gives its language model, token lists in hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

IMAGE, VIDEO, START, END = 110, 111, 112, 113
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SQUARE: dict[str, Any] = {"image_size": 56, "patch_size": 14}
TEXT: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA, QWEN2 = dict(model_type="llama", **TEXT), dict(model_type="qwen2", **TEXT)
CLIP = dict(model_type="clip_vision_model", projection_dim=32, **SQUARE, **VISION)
SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False, **SQUARE, **VISION)
ANYRES = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]], "image_token_index": IMAGE}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN_VISION = {"num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}


@dataclass(frozen=True)
class Kind:
    """model: makes it. sizes: what an image may be, the usual one first. tokens: size -> its placeholders. pixels:
    sizes of one prompt's images -> the arguments that bring them. around: placeholders -> ids with what stands around
    an image. separators: size -> placeholders that are not of the image. types: name of the argument that says where
    images are, and its value there. first: whether images stand in front of all text."""

    model: Callable[[], nn.Module]
    sizes: tuple[tuple[int, int], ...]
    tokens: Callable[[tuple[int, int]], int]
    pixels: Callable[[Sequence[tuple[int, int]]], dict[str, Tensor]]
    around: Callable[[int], list[int]] = lambda n: [IMAGE] * n
    separators: Callable[[tuple[int, int]], list[int]] = lambda size: []
    types: tuple[str, int] | None = None
    first: bool = False
    tiles: int = 1


def _square_pixels(sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(sizes), 3, 56, 56)}


def _tile_pixels(sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 2 * len(sizes), 3, 56, 56)}


def _two_tiles(sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2 * len(sizes), 3, 56, 56)}


def _row_pixels(patch: int, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    patches = sum(rows * columns for rows, columns in sizes)
    grids = torch.tensor([[1, rows, columns] for rows, columns in sizes])
    return {"pixel_values": torch.randn(patches, 6 * patch * patch), "image_grid_thw": grids}


def _anyres_pixels(sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    pixels = torch.randn(len(sizes), 5, 3, 56, 56)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _anyres_tokens(size: tuple[int, int]) -> int:
    rows, columns = size[0] // 14, size[1] // 14
    return 16 + rows * (columns + 1)


def _newlines(size: tuple[int, int]) -> list[int]:
    rows, columns = size[0] // 14, size[1] // 14
    return [16 + row * (columns + 1) + columns for row in range(rows)]


def _merged_tokens(size: tuple[int, int]) -> int:
    return size[0] * size[1] // 4


def _framed(n: int) -> list[int]:
    return [START, *[IMAGE] * n, END]


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    config = hf.LlavaNextConfig(
        vision_config=CLIP,
        text_config=LLAMA,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **ANYRES,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _onevision() -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=QWEN2, video_token_index=VIDEO, vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9", **ANYRES,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _internvl() -> nn.Module:
    vision = dict(image_size=[56, 56], patch_size=[14, 14], use_qk_norm=True, **VISION)
    config = hf.InternVLConfig(
        vision_config=vision, text_config=QWEN2, image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5,
        vision_feature_layer=-1,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config)


def _qwen(name: str, **vision: Any) -> nn.Module:
    config = getattr(hf, f"{name}Config")(
        vision_config={**QWEN_VISION, **vision}, text_config=dict(TEXT, rope_parameters=ROTARY), **QWEN_IDS
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def _qwen3() -> nn.Module:
    vision = dict(
        QWEN_VISION, depth=3, hidden_size=32, intermediate_size=64, patch_size=16, out_hidden_size=32,
        num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    text = dict(TEXT, head_dim=8, rope_parameters={**ROTARY, "mrope_section": [2, 1, 1]})
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_IDS))


def _gemma3() -> nn.Module:
    text = dict(
        TEXT, head_dim=8, sliding_window=64, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text, vision_config=dict(SQUARE, **VISION), mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    model = hf.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)  # the host's is zero
    return model


def _paligemma() -> nn.Module:
    text = {
        "model_type": "gemma", "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    config = hf.PaliGemmaConfig(vision_config=SIGLIP, text_config=text, image_token_index=IMAGE, projection_dim=32)
    return hf.PaliGemmaForConditionalGeneration(config)


def _idefics(name: str) -> nn.Module:
    config = getattr(hf, f"{name}Config")(
        vision_config=dict(SQUARE, **VISION), text_config=LLAMA, image_token_id=IMAGE, scale_factor=2
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def _row(model: Callable[[], nn.Module], patch: int = 14) -> Kind:
    def pixels(sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        return _row_pixels(patch, sizes)

    return Kind(model, ((8, 8), (4, 8)), _merged_tokens, pixels, _framed, types=("mm_token_type_ids", 1))


_ONE, _ANY = ((56, 56),), ((112, 112), (56, 112))
KINDS = {
    "llava": Kind(_llava, _ONE, lambda size: 16, _square_pixels),
    "llava_next": Kind(_llava_next, _ANY, _anyres_tokens, _anyres_pixels, separators=_newlines),
    "onevision": Kind(_onevision, _ANY, _anyres_tokens, _anyres_pixels, separators=_newlines),
    "qwen2_vl": _row(lambda: _qwen("Qwen2VL", depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2)),
    "qwen2_5_vl": _row(
        lambda: _qwen(
            "Qwen2_5_VL", depth=2, hidden_size=32, intermediate_size=64, window_size=56, out_hidden_size=32,
            fullatt_block_indexes=[1],
        )
    ),
    "qwen3_vl": _row(_qwen3, patch=16),
    "internvl": Kind(_internvl, _ONE, lambda size: 4, _two_tiles, tiles=2),
    "gemma3": Kind(_gemma3, _ONE, lambda size: 4, _square_pixels, _framed, types=("token_type_ids", 1)),
    "paligemma": Kind(_paligemma, _ONE, lambda size: 16, _square_pixels, types=("token_type_ids", 0), first=True),
    "idefics3": Kind(lambda: _idefics("Idefics3"), _ONE, lambda size: 4, _tile_pixels, tiles=2),
    "smolvlm": Kind(lambda: _idefics("SmolVLM"), _ONE, lambda size: 4, _tile_pixels, tiles=2),
}  # fmt: skip


def build(name: str, attention: str = "sdpa") -> nn.Module:
    """A model with weights so large that a wrong mask or position shows."""
    torch.manual_seed(0)
    model: Any = KINDS[name].model().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    return model


@dataclass(frozen=True)
class Example:
    """One prompt: its arguments, and for each image (for each of its tiles) the places of its tokens."""

    inputs: dict[str, Tensor]
    images: list[list[int]]


def prompt(name: str, seed: int = 0, images: int = 1, text: int = 4, size: int = 0) -> Example:
    """A prompt with images, and text around them."""
    kind = KINDS[name]
    torch.manual_seed(100 + seed)
    chosen = [kind.sizes[(size + i) % len(kind.sizes)] for i in range(images)]
    ids = [] if kind.first else [1, 5 + seed]
    places = []
    for one in chosen:
        for _ in range(kind.tiles):
            count = kind.tokens(one)
            start = len(ids) + kind.around(count).index(IMAGE)
            out = set(kind.separators(one))
            places.append([start + i for i in range(count) if i not in out])
            ids += [*kind.around(count), 3]
    ids += [20 + (7 * seed + i) % 60 for i in range(text)]
    tokens = torch.tensor([ids])
    inputs: dict[str, Tensor] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind.types is not None:
        inputs[kind.types[0]] = (tokens == IMAGE).long() * kind.types[1]
    if images:
        inputs |= kind.pixels(chosen)
    return Example(inputs, places)


def left_padded(prompts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several prompts as one batch."""
    length = max(one["input_ids"].shape[1] for one in prompts)
    batch = {}
    for key in prompts[0]:
        rows = [one[key] for one in prompts]
        if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            rows = [nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows]
        batch[key] = torch.cat(rows)
    return batch


def generate(model: Any, inputs: dict[str, Tensor], tokens: int = 4, **options: Any) -> tuple[Tensor, Tensor]:
    """(new tokens [B, T], scores [T, B, V]) of greedy generation."""
    options = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO]} | options
    out = model.generate(
        **inputs, max_new_tokens=tokens, output_scores=True, return_dict_in_generate=True, eos_token_id=None, **options
    )
    scores = torch.stack(out.scores).nan_to_num(0, 0, 0)
    return out.sequences[:, -tokens:], scores


def language_model(model: Any) -> nn.Module:
    """The text part."""
    return getattr(model.model, "language_model", None) or model.model.text_model


@torch.no_grad()
def by_hand(
    model: Any,
    inputs: dict[str, Tensor],
    gone: Sequence[int],
    tokens: int = 4,
    change: Callable[[Tensor], Tensor] = lambda embeds: embeds,
) -> tuple[Tensor, Tensor]:
    """(new tokens [1, T], scores [T, 1, V]) of greedy generation without a cache, the prompt's tokens `gone` left out.

    Each step runs the whole unpatched model on all tokens, takes what its language model is given, and runs that on
    those that stay, at their own positions. change: of the embeddings [1, L, C] before.
    """
    text, seen = language_model(model), {}

    def look(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    new, scores = [], []
    inputs = dict(inputs)
    for _ in range(tokens):
        hook = text.register_forward_pre_hook(look, with_kwargs=True)
        model(**inputs, use_cache=False)
        hook.remove()
        length = inputs["input_ids"].shape[1]
        keep = [i for i in range(length) if i not in set(gone)]
        seen["inputs_embeds"] = change(seen["inputs_embeds"])
        logits = model.lm_head(text(**narrowed(seen, keep), use_cache=False).last_hidden_state[:, -1])
        soft_cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        assert soft_cap is None
        logits[:, [IMAGE, VIDEO]] = float("-inf")
        scores.append(logits.nan_to_num(0, 0, 0))
        new.append(logits.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new[-1]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for key, text_type in (
            ("mm_token_type_ids", 0),
            ("token_type_ids", int("paligemma" in str(type(model)).lower())),
        ):
            if key in inputs:
                inputs[key] = nn.functional.pad(inputs[key], (0, 1), value=text_type)
    return torch.cat(new, 1), torch.stack(scores)


def narrowed(given: dict[str, Any], keep: list[int]) -> dict[str, Any]:
    """A language model's arguments at the tokens `keep`."""
    out: dict[str, Any] = {"inputs_embeds": given["inputs_embeds"][:, keep]}
    positions = given.get("position_ids")
    length = given["inputs_embeds"].shape[1]
    out["position_ids"] = torch.arange(length)[None][:, keep] if positions is None else positions[..., keep]
    mask = given.get("attention_mask")
    if isinstance(mask, dict):
        out["attention_mask"] = {k: None if m is None else m[:, :, keep][..., keep] for k, m in mask.items()}
    elif mask is not None and mask.ndim == 4:
        out["attention_mask"] = mask[:, :, keep][..., keep]
    else:
        out["attention_mask"] = torch.ones(1, len(keep), dtype=torch.long)
    if given.get("visual_pos_masks") is not None:
        visual = given["visual_pos_masks"]
        stays = [place in keep for place in visual[0].nonzero().flatten().tolist()]
        out["visual_pos_masks"] = visual[:, keep]
        out["deepstack_visual_embeds"] = [deep[torch.tensor(stays)] for deep in given["deepstack_visual_embeds"]]
    return out


def most_in_full(*few: str, names: Iterable[str] = KINDS) -> list[Any]:
    """All families, those beside `few` only in the full tier."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.full) for name in names]


def evenly_gone(example: Example, share: float) -> list[int]:
    """What `uniform` leaves out, by its formula."""
    gone: list[int] = []
    for places in example.images:
        keep = math.ceil(share * len(places) - 1e-6)
        kept = {(2 * j + 1) * len(places) // (2 * keep) for j in range(keep)}
        gone += [place for i, place in enumerate(places) if i not in kept]
    return gone


def close(mine: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """The same tokens, and scores within 2e-6 of the largest."""
    assert torch.equal(mine[0], other[0])
    assert (mine[1] - other[1]).abs().max() <= 2e-6 * other[1].abs().max()


class Processor:
    """As much of transformers' as is asked for."""

    image_processor = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.3])

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        image, text = messages[0]["content"]
        assert image == {"type": "image"}
        return f"<image>{text['text']}"

    def __call__(self, images: Any, text: list[str], return_tensors: str) -> dict[str, Tensor]:
        assert len(images) == 1
        words = [20 + len(word) for word in text[0].removeprefix("<image>").split()]
        return {"input_ids": torch.tensor([[1, 5, *[IMAGE] * 16, *words]])}

    def batch_decode(self, sequences: Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in sequences.tolist()]
