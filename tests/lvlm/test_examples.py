"""The examples with real checkpoints and with lmms-eval, on a small model and on a stand-in for that package."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from example import load
from lvlm_zoo import build, prompt
from PIL import Image
from torch import Tensor

import tokenprune

ROOT = Path(__file__).parents[2]


class Batch(dict[str, Tensor]):
    def to(self, *args: Any) -> Batch:
        return self


class Processor:
    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        return "<image>" + messages[0]["content"][1]["text"]

    def __call__(self, images: Any, text: list[str], return_tensors: str) -> Batch:
        return Batch(prompt("llava").inputs)

    def batch_decode(self, sequences: Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in sequences.tolist()]


def test_a_checkpoint_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llava")
    asked: list[str] = []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append(name)
        return model

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: Processor())
    Image.new("RGB", (56, 56)).save(tmp_path / "photo.png")
    load("vlm_checkpoint").main([str(tmp_path / "photo.png"), "where is it", "--method", "uniform"])
    printed = capsys.readouterr().out
    assert asked == ["Qwen/Qwen2.5-VL-3B-Instruct"]
    assert "uniform" in printed
    plain, answer = (line.split(": ")[1] for line in printed.splitlines()[-2:])
    expected = []
    for keep in (1.0, 0.25):
        with tokenprune.patched(model, "uniform", keep=keep):
            inputs = prompt("llava").inputs
            out = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            expected.append(" ".join(map(str, out[0].tolist())))
    assert [plain, answer] == expected
    assert plain != answer


# Of lmms-eval, as far as the example relies on it: file -> {definition: its parameters or fields}.
PINNED = json.loads((ROOT / "tests" / "hosts" / "lmms_eval.json").read_text())["signatures"]


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Registry:
    def __init__(self) -> None:
        self.manifests: list[ModelManifest] = []

    def register_manifest(self, manifest: ModelManifest, *, overwrite: bool = False) -> None:
        self.manifests.append(manifest)


class Huggingface:
    is_simple = False

    def __init__(
        self, pretrained="", device="cuda", device_map="auto", batch_size=1, use_cache=True, attn_implementation=None,
        max_num_frames=32, use_custom_video_loader=False, fps=None, max_image_size=None, system_prompt=None,
        interleave_visuals=False, reasoning_prompt=None, trust_remote_code=False, **kwargs,
    ) -> None:  # fmt: skip
        assert kwargs == {}
        self._model, self.batch_size = build(pretrained), batch_size

    @property
    def model(self) -> Any:
        return self._model

    def generate_until(self, requests: list[Any]) -> list[Any]:
        return [self.model.generate(**request, max_new_tokens=2, do_sample=False) for request in requests]


def test_lmms_eval_plugin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    registry, ran = Registry(), []
    parts = {
        "lmms_eval": {},
        "lmms_eval.__main__": {"cli_evaluate": lambda args=None: ran.append(args)},
        "lmms_eval.models": {"MODEL_REGISTRY_V2": registry},
        "lmms_eval.models.chat": {},
        "lmms_eval.models.chat.huggingface": {"Huggingface": Huggingface},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for (_, definitions), cls in zip(list(PINNED.items())[1:], (ModelManifest, Huggingface), strict=True):
        name = next(iter(definitions))
        assert [p for p in inspect.signature(cls.__init__).parameters if p != "self"] == [
            p for p in definitions[name] if p != "self"
        ]
    plugin = load("lmms_eval_plugin")
    plugin.main()
    assert ran == [None]
    (manifest,) = registry.manifests
    assert manifest.model_id == "tokenprune"
    module, name = manifest.chat_class_path.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    assert cls.is_simple is False
    # as lmms-eval makes it of --model_args and --batch_size
    runner = cls(**{"pretrained": "llava", "method": "fopru", "strategy": "row", "tokens": 8}, **{"batch_size": 1})
    request = prompt("llava").inputs
    (answer,) = runner.generate_until([request])
    with tokenprune.patched(build("llava"), "fopru", strategy="row", tokens=8) as model:
        assert torch.equal(answer, model.generate(**request, max_new_tokens=2, do_sample=False))
    assert "fopru" in capsys.readouterr().out
    assert tokenprune.report(runner.model).to_dict()["places"][0]["tokens_out"] == 8
