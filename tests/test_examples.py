"""The examples for what stands around a model: pipelines, loops, adapters, quantised weights, exports, a node."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
import zoo
from accelerate import Accelerator
from example import EXAMPLES, load
from families import METHODS, full_but
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import tokenprune
from tokenprune import UnsupportedModel, cli

NAME = "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "num_heads": 3, "depth": 4}


def small(classes: int = 10) -> nn.Module:
    model = timm.create_model(NAME, num_classes=classes, **SHAPE).eval()
    zoo.randomise(model, seed=0)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of pictures of noise."""
    generator = torch.Generator().manual_seed(0)
    for label in "abc":
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(3):
            pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(tmp_path / "data" / label / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def in_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of timm that an example creates are small ones."""
    create = timm.create_model

    def small_instead(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        assert not pretrained
        options = {key: value for key, value in options.items() if value is not None}
        overlay = {"input_size": (3, 32, 32)}
        return create(name, **{**SHAPE, **options}, pretrained_cfg_overlay=overlay)

    monkeypatch.setattr(timm, "create_model", small_instead)


def test_hugging_face_pipeline(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTConfig(image_size=32, patch_size=4, num_labels=5, **shape)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    pictures = [str(path) for path in sorted(folder.rglob("*.png"))[:2]]
    command = [*pictures, "--model", str(tmp_path / "model"), "--method", "top_k"]
    patched = load("hf_pipeline").main([*command, "--flops", "0.6"])
    assert "top_k" in capsys.readouterr().out
    assert [len(answer) for answer in patched] == [3, 3]
    plain = transformers.pipeline("image-classification", model=str(tmp_path / "model"))(pictures, top_k=3)
    assert load("hf_pipeline").main([*command, "--flops", "1.0"]) == plain
    assert patched != plain


@pytest.mark.usefixtures("in_timm")
def test_timm_validate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small(3)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    command = [str(folder), "--model", NAME, "--checkpoint", str(tmp_path / "weights.safetensors"), "--workers", "0"]
    command += ["--num-classes", "3", "--batch-size", "2", "--method", "tome"]
    found = {flops: load("timm_validate").main([*command, "--flops", flops]) for flops in ("0.6", "1.0")}
    assert "of 9 images" in capsys.readouterr().out
    config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    transform = timm.data.create_transform(**config)
    inputs = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])
    for flops, (top1, top5) in found.items():
        with tokenprune.patched(model, "tome", flops=float(flops)), torch.no_grad():
            right = model(inputs).argmax(1) == torch.arange(9) // 3
        assert top1 == pytest.approx(100 * float(right.double().mean()))
        assert top5 == 100.0  # of three classes


class Patcher:
    """ComfyUI's ModelPatcher, as far as the node relies on it."""

    def __init__(self, model: nn.Module, patches: dict[str, list[Callable[..., Any]]] | None = None) -> None:
        self.model, self.patches = model, patches or {}

    def clone(self) -> Patcher:
        return Patcher(self.model, {name: list(hooks) for name, hooks in self.patches.items()})

    def get_model_object(self, name: str) -> nn.Module:
        assert name == "diffusion_model"
        return self.model

    def set_model_attn1_patch(self, hook: Callable[..., Any]) -> None:
        self.patches.setdefault("attn1_patch", []).append(hook)

    def set_model_attn1_output_patch(self, hook: Callable[..., Any]) -> None:
        self.patches.setdefault("attn1_output_patch", []).append(hook)


class Unet(nn.Module):
    """Self-attention at three levels of the latents, with ComfyUI's hooks around it."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
        self.seen: list[int] = []

    def forward(self, latents: Tensor, patches: dict[str, list[Callable[..., Any]]]) -> list[Tensor]:
        self.seen, outputs = [], []
        for level, qkv in enumerate(self.input_blocks):
            x = nn.functional.avg_pool2d(latents, 2**level).flatten(2).transpose(1, 2)
            n, context, value, options = x, x, x, {"original_shape": list(latents.shape)}
            for hook in patches.get("attn1_patch", []):
                n, context, value = hook(n, context, value, options)
            self.seen.append(n.shape[1])
            (q, *_), (_, k, _), (*_, v) = (qkv(part).chunk(3, -1) for part in (n, context, value))
            n = nn.functional.scaled_dot_product_attention(q, k, v)
            for hook in patches.get("attn1_output_patch", []):
                n = hook(n, options)
            outputs.append(x + n)
        return outputs


@pytest.mark.parametrize(("most", "seen"), [(1, [48, 48, 12]), (2, [48, 12, 12])])
def test_comfyui_node(most: int, seen: list[int]) -> None:
    node = load("comfyui_tokenprune").NODE_CLASS_MAPPINGS["TokenpruneMergeTokens"]
    assert set(node.INPUT_TYPES()["required"]) == {"model", "ratio", "max_downsample"}
    torch.manual_seed(0)
    model = Patcher(Unet().double())
    (patched,) = getattr(node(), node.FUNCTION)(model, 0.75, most)
    assert model.patches == {}
    # All tokens of a window are alike: to merge them loses nothing.
    latents = torch.randn(2, 8, 3, 4).double().repeat_interleave(4, 2).repeat_interleave(4, 3)
    plain = model.model(latents, model.patches)
    assert model.model.seen == [192, 48, 12]
    for got, want in zip(model.model(latents, patched.patches), plain, strict=True):
        torch.testing.assert_close(got, want)
    assert model.model.seen == seen
    others = torch.randn(2, 8, 12, 16).double()
    reduced, whole = model.model(others, patched.patches), model.model(others, model.patches)
    assert reduced[0].shape == whole[0].shape
    assert not torch.allclose(reduced[0], whole[0])
    assert torch.equal(reduced[2], whole[2])
    with pytest.raises(UnsupportedModel, match="no UNet"):
        node().patch(Patcher(nn.Linear(2, 2)), 0.5, 1)


def test_peft_in_either_order() -> None:
    example = load("peft_lora")
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    found = []
    for first in (True, False):
        model = small()
        if first:
            tokenprune.patch(model, "top_k", keep=0.5)
        torch.manual_seed(0)
        peft_model = get_peft_model(model, example.LORA)
        if not first:
            tokenprune.patch(peft_model, "top_k", keep=0.5)
        losses = example.train(peft_model, images, labels)
        with torch.no_grad():
            adapted = peft_model(images)
            merged = peft_model.merge_and_unload()
            torch.testing.assert_close(merged(images), adapted, rtol=1e-4, atol=1e-4)
            assert tokenprune.report(merged).to_dict()["places"][-1]["tokens_out"] == 32
            tokenprune.unpatch(merged)
            found.append((losses, adapted, merged(images)))
        assert not torch.allclose(found[-1][1], found[-1][2], atol=1e-3)
    torch.testing.assert_close(found[0], found[1])
    assert found[0][0][-1] < found[0][0][0]


@pytest.mark.usefixtures("in_timm")
def test_peft_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    load("peft_lora").main()
    assert "top_k" in capsys.readouterr().out


@pytest.mark.usefixtures("in_timm")
def test_quantised_in_either_order(capsys: pytest.CaptureFixture[str]) -> None:
    plain = small()
    images = torch.randn(2, 3, 32, 32)
    first, then = copy.deepcopy(plain), copy.deepcopy(plain)
    tokenprune.patch(first, "top_k", flops=0.6)
    quantize_(first, Int8WeightOnlyConfig())
    quantize_(then, Int8WeightOnlyConfig())
    with torch.no_grad():
        whole = then(images)
        tokenprune.patch(then, "top_k", flops=0.6)
        assert torch.equal(first(images), then(images))
        assert not torch.equal(first(images), whole)
        assert torch.equal(tokenprune.unpatch(first)(images), whole)
        expected = tokenprune.report(tokenprune.patch(plain, "top_k", flops=0.6)).to_dict()
        assert tokenprune.report(then).to_dict()["flops_after"] == expected["flops_after"]
    load("torchao_int8").main([])
    before, after = (float(words.split(" MB")[0].split()[-1]) for words in capsys.readouterr().out.split("MB")[:2])
    assert after < before


@pytest.mark.usefixtures("in_timm")
def test_accelerate(tmp_path: Path) -> None:
    losses = load("accelerate_training").main(["--output", str(tmp_path), "--steps", "2"])
    assert len(losses) == 2
    accelerator, outputs = Accelerator(), []
    for first in (True, False):
        model, images = small(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        if first:
            tokenprune.patch(model, "tome", keep=0.5)
        prepared = accelerator.prepare(model)
        if not first:
            tokenprune.patch(accelerator.unwrap_model(prepared), "tome", keep=0.5)
        with torch.no_grad():
            before = prepared(images)
            accelerator.save_state(tmp_path / str(first))
            for parameter in prepared.parameters():
                parameter.zero_()
            accelerator.load_state(tmp_path / str(first))
            assert torch.equal(prepared(images), before)
        accelerator.free_memory()
        outputs.append(before)
        saved = tmp_path / str(first) / "model.safetensors"
        unpatched = small()
        unpatched.load_state_dict(load_file(saved))
    assert torch.equal(*outputs)


@pytest.mark.usefixtures("in_timm")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", full_but(("top_k", "uniform"), (*METHODS, "ltmp_fixed")))
def test_onnx(method: str, tmp_path: Path) -> None:
    assert load("onnx_export").main([str(tmp_path / "vit.onnx"), "--method", method]) < 1e-4


def files_of_examples() -> list[Path]:
    return sorted(path for path in EXAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def users_of(name: str) -> list[str]:
    """The tests that load or run the example of that name."""
    used = re.compile(rf'load\("{name}"\)|"{name}\.py"')
    return [path.name for path in Path(__file__).parent.rglob("test_*.py") if used.search(path.read_text())]


@pytest.mark.parametrize("path", files_of_examples(), ids=lambda path: path.name)
def test_nothing_in_the_examples_is_untested(path: Path) -> None:
    if path.suffix == ".sh":
        check_script(path)
        return
    assert path.suffix == ".py", f"{path.name}: nothing here runs or checks a file like this"
    top = path.relative_to(EXAMPLES).parts[0]
    assert users_of(top.removesuffix(".py")), f"no test loads or runs {top}"


def check_script(path: Path) -> None:
    """A script of bash whose command our parser takes, with the arguments that it is shown with."""
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text().replace("\\\n", " ")
    shown = re.search(rf"{path.name} (--.*)", re.sub(r"\s*\\?\n#\s{{4,}}", " ", path.read_text()))
    command = re.search(r"-m tokenprune\.cli (.*)", text)
    assert shown is not None, "no comment shows how it is started"
    assert command is not None, "it runs something else"
    arguments = command[1].replace('"$@"', shown[1].replace("\\", ""))
    assert cli.parser().parse_args(shlex.split(arguments)).command in cli.SHARED_OUT


def test_an_example_without_a_test_is_seen(tmp_path: Path) -> None:
    assert users_of("no_such" + "_example") == []
    script = tmp_path / "run.sh"
    for line, error in (
        ("torchrun -m tokenprune.cli eval --no-such-option", SystemExit),
        ("torchrun -m another.module", AssertionError),
        ("if then", subprocess.CalledProcessError),
    ):
        script.write_text(f"# bash run.sh --model digits-vit\n{line}\n")
        with pytest.raises(error):
            check_script(script)
