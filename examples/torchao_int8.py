"""A timm ViT with int8 weights by torchao that also computes fewer tokens: the two add up, in either order.

Needs `pip install torchao`. Run it: python examples/torchao_int8.py --model vit_small_patch16_224
"""

import argparse

import timm
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import tokenprune


def megabytes(model: torch.nn.Module) -> float:
    """Of all weights as they are stored, quantised ones with their scales."""
    inner = (p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else () for p in model.parameters())
    stored = [[getattr(p, name) for name in names] or [p] for p, names in zip(model.parameters(), inner, strict=True)]
    return sum(tensor.numel() * tensor.element_size() for tensors in stored for tensor in tensors) / 1e6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    options = parser.parse_args(arguments)

    model = timm.create_model(options.model).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    before = megabytes(model)
    quantize_(model, Int8WeightOnlyConfig())
    tokenprune.patch(model, "top_k", flops=0.6)  # or patched first, then quantised
    with torch.inference_mode():
        print(model(images).shape)
    print(f"weights {before:.1f} MB, quantised {megabytes(model):.1f} MB")
    print(tokenprune.report(model))


if __name__ == "__main__":
    main()
