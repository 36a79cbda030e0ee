"""How each documented command is run in a test: as it is written, with the least of everything.

A command's options are replaced by those of CHEAPER (an option that only stands for one that is missing is in ADDED),
its placeholders by PLACEHOLDERS, and its model and its data by small ones that `tests/docs/conftest.py` sets up under
the very names. What is in none of the tables below is run, and what cannot be run fails.
"""

from __future__ import annotations

from pathlib import Path

QUALITY = Path(__file__).parents[1] / "tokenprune/evals/quality.json"
FASTER: dict[str, str | list[str]] = {
    "--samples": "4",
    "--batch-size": "2",
    "--candidates": "4",
    "--speedup": "1.05",
}
# The first words of a command: option -> its value instead; a list for one that is given several times.
CHEAPER: dict[str, dict[str, str | list[str]]] = {
    "tokenprune bench": {"--rounds": "20", "--batch-size": "1"},
    "tokenprune eval": {"--samples": "8", "--batch-size": "4"},
    "tokenprune eval --model dit-digits": {"--samples": "2", "--steps": "2"},
    "tokenprune eval --model unet-digits": {"--samples": "2", "--steps": "2"},
    "tokenprune eval --model lvlm-digits": {"--samples": "3"},
    "tokenprune compare": {"--samples": "8", "--batch-size": "4", "--method": "uniform", "--flops": ["0.8", "0.6"]},
    "tokenprune patterns": {"--samples": "4", "--resamples": "10"},
    "tokenprune search": {"--samples": "4", "--batch-size": "2", "--candidates": "4"},
    "tokenprune search --model digits-swin --method sparsevit --speedup": FASTER,
    "tokenprune search --model deit_small_patch16_224 --data pictures --method tome --speedup": FASTER,
    "tokenprune search --model NAME": FASTER,
    "tokenprune calibrate": {"--samples": "8"},
    "tokenprune train deblur-swin": {},
    "tokenprune train dit-digits": {},
    "tokenprune train lvlm-digits": {},
    "tokenprune train": {"--batch-size": "4", "--epochs": "1"},
    "tokenprune train digits-vit": {"--samples": "8", "--batch-size": "4", "--epochs": "1"},
    "tokenprune train digits-swin": {"--samples": "8", "--batch-size": "4", "--epochs": "1"},
    "tokenprune train digit-masks": {"--samples": "8", "--batch-size": "4", "--epochs": "1"},
    "tokenprune train digit-masks --output": {"--steps": "1"},
    "tokenprune train digit-reader --output": {"--steps": "1"},
    "accelerate launch -m tokenprune.cli train": {"--batch-size": "4", "--epochs": "1"},
    "accelerate launch --multi_gpu --num_processes 4 -m tokenprune.cli search": {
        "--samples": "4",
        "--batch-size": "2",
        "--candidates": "4",
        "--device": "cpu",
    },
    "torchrun --nproc-per-node 4 -m tokenprune.cli eval": {"--device": "cpu", "--batch-size": "4"},
    "python -m tokenprune.evals.checkpoint_quality": {"--samples": "2", "--steps": "1"},
    "python -m tokenprune.evals.deblur_quality": {"--samples": "1"},
    "python -m tokenprune.evals.dense_quality": {"--samples": "4", "--method": "uniform", "--flops": "0.6"},
    "python -m tokenprune.evals.dinov2_speed": {"--batch-size": "1", "--method": "top_k", "--attempts": "1"},
    "python -m tokenprune.evals.equal_latency": {"--images": "8", "--batch-size": "2"},
    "python -m tokenprune.evals.generation_curves": {"--samples": "10", "--rows": "1"},
    "python -m tokenprune.evals.kernel_bench": {"--tokens": "64", "--longest": "0.1"},
    "python -m tokenprune.evals.learned_quality": {"--samples": "8"},
    "python -m tokenprune.evals.lvlm_speed": {"--layers": "4", "--tower-layers": "3", "--method": "fopru"},
    "python -m tokenprune.evals.mass_quality": {"--images": "2"},
    "python -m tokenprune.evals.quality_table": {"--samples": "4", "--method": "uniform", "--flops": "0.6"},
    "python -m tokenprune.evals.quality_table neighbours": {
        "--samples": "99",
        "--method": "uniform",
        "--flops": "0.6",
        "--drawings": "drawings",
    },
    "python -m tokenprune.evals.ragged": {"--batch-size": "2"},
    "python -m tokenprune.evals.region_quality": {"--samples": "2", "--ways": "part"},
    "python -m tokenprune.evals.region_speed": {"--table": "small"},
    "python -m tokenprune.evals.selector_speed": {"--batch-size": "1"},
    "python -m tokenprune.evals.train_masked": {"--small-steps": "1", "--whole-steps": "1", "--masked-steps": "1"},
    "python -m tokenprune.evals.training_speed": {"--training": "digits-vit"},
    "python -m tokenprune.evals.tuned_masks": {"--samples": "4", "--batch-size": "4", "--epochs": "1"},
    "python -m tokenprune.evals.window_speed": {"--size": "224"},
    "python -m tokenprune.evals.window_speed --size": {"--flops": "0.8"},  # 0.72 is the least of so narrow a model
}
# Given where the command does not give it.
ADDED: dict[str, dict[str, str]] = {
    "tokenprune bench": {"--method": "uniform"},
    "tokenprune eval": {"--method": "uniform"},
    "tokenprune patterns": {"--method": "top_k"},
}
PLACEHOLDERS: dict[str, dict[str, str]] = {
    "tokenprune COMMAND": {"COMMAND": "eval"},
    "tokenprune eval --model dinov2-small-wheel --method ...": {"...": "tome"},
    "tokenprune search --model NAME": {"NAME": "swin_tiny_patch4_window7_224"},
    "tokenprune train MODEL": {"MODEL": "deit_small_patch16_224", "FOLDER": "imagenet/train"},
    "python -m tokenprune.evals.default_table": {"tokenprune/evals/quality.json": str(QUALITY)},
}
# Run by make test-full alone: more than some seconds even so.
LONG = [
    "accelerate launch",
    "python -m tokenprune.evals.adapt_swin",
    "python -m tokenprune.evals.deblur_quality",
    "python -m tokenprune.evals.train_adawpt",
    "python -m tokenprune.evals.equal_latency",
    "python -m tokenprune.evals.kernel_bench",
    "python -m tokenprune.evals.lvlm_speed",
    "python -m tokenprune.evals.quality_table neighbours",
    "python -m tokenprune.evals.quality_table saliency",
    "python -m tokenprune.evals.selector_speed",
    "python -m tokenprune.evals.training_speed",
    "python -m tokenprune.evals.window_speed",
    "tokenprune eval --model dinov2-small-wheel",
    "tokenprune patterns --model dinov2-small-wheel",
    "tokenprune search --model NAME",
    "tokenprune search --model deit_small_patch16_224 --data pictures --method tome --min-agreement",
    "tokenprune search --model digits-swin --method sparsevit --speedup 1.3 --batch-size 8",
    "tokenprune train deit_small_patch16_224",
    "python -m tokenprune.evals.region_quality",
    "python -m tokenprune.evals.denoiser_speed",
    "python -m tokenprune.evals.region_speed",
    "python -m tokenprune.evals.mass_quality",
    "python -m tokenprune.evals.method_pictures",
    "python -m tokenprune.evals.ragged",
    "python -m tokenprune.evals.dinov2_speed",
    "tokenprune bench --model dinov2-small-wheel",
]
# A command: the test that runs it, or the step of continuous integration.
ELSEWHERE: dict[str, str] = {
    "make install": "Makefile",
    "tokenprune demo": "tests/evals/test_demo.py::test_demo_writes_a_table_and_two_pictures",
    "tokenprune demo-diffusion": (
        "tests/evals/test_demo_diffusion.py::test_demo_writes_a_grid_for_each_model_and_a_table"
    ),
    "make test": ".ci/run",
    "make docs": ".ci/run",
    "make lint docs test": ".ci/run",
    "python examples/lmms_eval_plugin.py": "tests/lvlm/test_examples.py::test_lmms_eval_plugin",
    "python examples/vlm_checkpoint.py": "tests/lvlm/test_examples.py::test_a_checkpoint_is_compared",
    "python examples/hf_pipeline.py": "tests/test_examples.py::test_hugging_face_pipeline",
    "python examples/onnx_export.py": "tests/test_examples.py::test_onnx",
}
# What no machine of the tests can run: only its words are checked. A command: why.
PARSED: dict[str, str] = {
    "make test-full": "the tests themselves",
    "make test-hosts": "downloads the libraries' sources",
    "make test-gpu": "needs a GPU",
    "python -m tokenprune.evals.gpu_bench": "needs a GPU",
    "python -m tokenprune.evals.kernel_bench --output bench-output --device cuda": "needs a GPU",
    "tokenprune score": "downloads Inception's and CLIP's weights",
    "tokenprune eval --model clip:openai/clip-vit-base-patch32": "downloads the weights",
    "tokenprune eval --model vlm:llava-hf/llava-1.5-7b-hf": "downloads the weights",
    "tokenprune eval --model pipe:stabilityai/stable-diffusion-2-1": "downloads the weights",
    "pip install lmms-eval": "downloads it",
    "pip install onnx onnxscript onnxruntime": "downloads them",
    "pip install torchao": "downloads it",
}

# What a page's Python takes as given, once for all of its blocks.
DIGITS = """
import tokenprune
from tokenprune.evals.digits import cluttered_digits
from tokenprune.evals.digits_vit import digits_vit
vit, (images, labels) = digits_vit(), cluttered_digits("test", 8)
"""
GIVEN = {
    "docs/lvlm.md": """
import tokenprune, torch
from lvlm_zoo import Processor, build, prompt
from PIL import Image
vlm, inputs, processor = build("llava"), prompt("llava").inputs, Processor()
image, question = Image.effect_noise((300, 200), 60).convert("RGB"), "How many planes?"
examples = [(image, question)]
""",
    "docs/evaluation.md": """
from timm import create_model
import torch
from tokenprune.evals.accuracy import evaluate
from tokenprune.evals.digit_masks import mask_head, masked_digits
from tokenprune.evals.digits_vit import digits_vit
model = create_model("vit_tiny_patch16_224").eval()
tower, head, transform = digits_vit(), mask_head(), None
images_and_maps = masked_digits("test", 4)
""",
    "docs/methods.md": DIGITS + "model = vit",
    "docs/patterns.md": DIGITS,
    "docs/search.md": DIGITS,
    "docs/vit.md": DIGITS
    + """
import timm
swin = timm.create_model("swin_tiny_patch4_window7_224")
hiera = timm.create_model("hiera_tiny_224")
""",
    "docs/training.md": DIGITS
    + """
import timm
import torch
from tokenprune.evals.digit_masks import DigitMasks, masked_digits
from tokenprune.evals.digits_denoisers import dit
from tokenprune.learning import Learned, Recipe
from tokenprune.methods.ltmp import Thresholds, into_range, off_budget, rate, weaken
segmenter, (_, maps) = DigitMasks(), masked_digits("test", 8)
vit.train()
transformer = dit(num_layers=4).train()
target = torch.randn(2, 3, 36, 36)
pictures, classes = torch.randn(4, 3, 224, 224), torch.arange(4) % 3
noisy = {"hidden_states": target, "timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([3, 4])}
swin = timm.create_model("swin_tiny_patch4_window7_224")
""",
}
# Its words: what stands there instead.
INSTEAD: dict[str, dict[str, str]] = {
    "docs/lvlm.md": {"vlm.generate(**": "vlm.generate(max_new_tokens=2, **"},
    "docs/diffusion-models.md": {
        "drawing_orders(10, ": "drawing_orders(1, ",
        "latents=orders.noise)": "latents=orders.noise, num_inference_steps=2)",
    },
    "docs/evaluation.md": {'"ade20k", ': "images_and_maps, ", "num_classes = 150": "num_classes = 11"},
    "docs/search.md": {'"top_k", flops=0.6)': '"top_k", flops=0.6, candidates=4)'},
    "docs/vit.md": {"batch_size=4)": "batch_size=4, stride=40)"},
    "docs/training.md": {
        'output="adapted-swin")': 'output="adapted-swin", epochs=1, batch_size=4)',
        'output="learned")': 'output="learned", epochs=1, batch_size=4)',
        '"cropr", flops=0.5)': '"cropr", flops=0.5, epochs=1, batch_size=4)',
        "transformer(...)": "transformer(**noisy)",
    },
}
