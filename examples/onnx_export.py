"""A patched ViT as an ONNX file for batches of any size, compared with torch in ONNX Runtime.

Needs `pip install onnx onnxscript onnxruntime`. Run it:

    python examples/onnx_export.py vit.onnx --model deit_tiny_patch16_224 --method tome
"""

import argparse

import onnxruntime
import timm
import torch

import tokenprune


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true", help="needs the network")
    parser.add_argument("--method", default="top_k", help="one of a fixed budget (default: %(default)s)")
    parser.add_argument("--keep", type=float, default=0.5, help="of the patch tokens (default: %(default)s)")
    options = parser.parse_args(arguments)

    model = timm.create_model(options.model, pretrained=options.pretrained).eval()
    tokenprune.patch(model, options.method, keep=options.keep)
    example, images = (torch.randn(batch, *model.pretrained_cfg["input_size"]) for batch in (2, 3))
    batch = torch.export.Dim("batch", min=2, max=256)  # a batch of one would be made a constant
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=({0: batch},))
    program.save(options.file)

    session = onnxruntime.InferenceSession(options.file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        difference = float((torch.from_numpy(found) - model(images)).abs().max())
    print(tokenprune.report(model))
    print(f"written to {options.file}; largest difference from torch {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
