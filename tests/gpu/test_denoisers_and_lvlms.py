"""Patched denoisers and vision-language models on a GPU give what they give on the CPU."""

from __future__ import annotations

from typing import Any

import denoisers_zoo
import lvlm_zoo
import pytest
import torch
from torch import Tensor

import tokenprune


@pytest.fixture(autouse=True)
def _convolutions_as_precise_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def to_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cuda()
        if isinstance(value, Tensor)
        else to_gpu(value)
        if isinstance(value, dict)
        else type(value)(part.cuda() if isinstance(part, Tensor) else part for part in value)
        if isinstance(value, (list, tuple))
        else value
        for name, value in inputs.items()
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "at_edm": {"keep": 0.6, "steps": {}},
    "tomesd": {"use_rand": False},
    "random": {"keep": 0.6},
    "uniform": {"keep": 0.6},
}


# Where attention by itself runs on fewer tokens, which tomesd needs.
ALONE = ("unet_sd", "unet_sdxl", "pixart")
PAIRS = [(name, method) for name in denoisers_zoo.ZOO for method in OPTIONS if method != "tomesd" or name in ALONE]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_denoiser(name: str, method: str) -> None:
    model, inputs = denoisers_zoo.build(name)
    inputs = inputs(2, 12, 16)
    tokenprune.patch(model, method, **OPTIONS[method])
    expected = denoisers_zoo.run(model, inputs)
    model.cuda()
    found = denoisers_zoo.run(model, to_gpu(inputs)).cpu()
    assert (found - expected).norm() <= 2e-2 * expected.norm()
    half = denoisers_zoo.run(
        model.bfloat16(),
        {
            name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in to_gpu(inputs).items()
        },
    )
    assert half.isfinite().all()


@pytest.mark.parametrize("method", ["fopru", "top_k", "visionzip", "divprune", "fastv", "feather", "pyramid_drop"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_a_vision_language_model(name: str, method: str) -> None:
    inputs = lvlm_zoo.prompt(name).inputs
    model = tokenprune.patch(lvlm_zoo.build(name), method, keep=0.5)
    tokens, scores = lvlm_zoo.generate(model, inputs)
    found, found_scores = lvlm_zoo.generate(model.cuda(), to_gpu(inputs))
    assert torch.equal(found.cpu(), tokens)
    assert (found_scores.cpu() - scores).norm() <= 1e-2 * scores.norm()
