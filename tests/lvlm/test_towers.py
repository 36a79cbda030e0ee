"""The image towers of vision-language models, patched by themselves inside of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lvlm_zoo import build, close, generate, most_in_full, prompt
from torch import Tensor, nn

import tokenprune

TOWERS = ("internvl", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def tower_of(model: Any) -> nn.Module:
    inner = model.model
    return next(getattr(inner, n) for n in ("vision_tower", "visual", "vision_model") if hasattr(inner, n))


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", most_in_full("internvl", "idefics3", "qwen2_5_vl", "qwen3_vl", names=TOWERS))
def test_answers_of_a_model_whose_tower_is_patched(name: str, attention: str) -> None:
    model, example = build(name, attention), prompt(name, images=2)
    tower = tower_of(model)
    plain = generate(model, example.inputs)
    tokenprune.patch(tower, "top_k", keep=1.0)
    assert torch.equal(generate(model, example.inputs)[1], plain[1])
    depth = len([m for m in tower.modules() if type(m).__name__.endswith(("Layer", "Block"))])
    tokenprune.patch(tower, "top_k", schedule=dict.fromkeys(range(depth), 1.0))
    close(generate(model, example.inputs), plain)
    tokenprune.patch(tower, "top_k", keep=0.5)
    fewer = generate(model, example.inputs)
    assert fewer[1].isfinite().all()
    assert not torch.equal(fewer[1], plain[1])
    report = tokenprune.report(tower).to_dict()
    # Of Qwen-VL's two images of different sizes the report gives the larger one.
    assert report["places"][-1]["tokens_out"] == report["tokens"] // 2
    tokenprune.unpatch(model)
    assert torch.equal(generate(model, example.inputs)[1], plain[1])


@pytest.mark.parametrize("name", most_in_full("idefics3", "qwen2_5_vl", names=TOWERS))
def test_a_patch_of_the_whole_stands_beside_that_of_the_tower(name: str) -> None:
    model, example = build(name), prompt(name)
    tower = tower_of(model)
    tokenprune.patch(tower, "top_k", keep=0.5)
    inside = model(**example.inputs).logits
    with tokenprune.patched(model, "uniform", keep=0.5):
        both = model(**example.inputs).logits
        assert not torch.equal(both, inside)
        tokenprune.unpatch(tower)
        assert not torch.equal(model(**example.inputs).logits, both)
        tokenprune.patch(tower, "top_k", keep=0.5)
        assert torch.equal(model(**example.inputs).logits, both)
    for method in ("divprune", "fastv"):
        with tokenprune.patched(model, method, keep=0.5):
            assert generate(model, example.inputs)[1].isfinite().all()
    with (
        tokenprune.patched(model, "top_k", keep=0.5),
        pytest.raises(tokenprune.UnsupportedModel, match="patched itself"),
    ):
        model(**example.inputs)
    assert torch.equal(model(**example.inputs).logits, inside)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_images_are_refused(attention: str) -> None:
    """Their padding would be among the tokens that are chosen."""
    model, example = build("idefics3", attention), prompt("idefics3")
    mask = torch.ones(1, 2, 56, 56, dtype=torch.long)
    whole: dict[str, Tensor] = {**example.inputs, "pixel_attention_mask": mask.clone()}
    mask[0, 1, :, 28:] = 0
    padded: dict[str, Tensor] = {**example.inputs, "pixel_attention_mask": mask}
    plain = model(**padded).logits
    tower = model.model.vision_model
    tokenprune.patch(tower, "top_k", keep=1.0)
    assert torch.equal(model(**padded).logits, plain)
    tokenprune.patch(tower, "top_k", keep=0.5)
    with pytest.raises(tokenprune.UnsupportedModel, match="padded patches"):
        model(**padded)
    assert torch.equal(model(**whole).logits, model(**example.inputs).logits)
