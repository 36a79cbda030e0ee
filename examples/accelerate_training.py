"""A patched ViT under accelerate: prepared, trained, stored and loaded again, on as many processes as are launched.

Run it: accelerate launch examples/accelerate_training.py --output state
"""

import argparse

import timm
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import tokenprune


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the state")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    accelerator = Accelerator()
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=10)
    tokenprune.patch(model, "tome", keep=0.5)  # behind prepare it is the same: patch(accelerator.unwrap_model(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = DataLoader(TensorDataset(torch.randn(64, 3, 64, 64), torch.randint(10, (64,))), batch_size=8)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _, (images, labels) in zip(range(options.steps), data, strict=False):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    accelerator.save_state(options.output)  # the weights are those of the unpatched model: the patch is no part of them
    accelerator.load_state(options.output)
    accelerator.print(tokenprune.report(accelerator.unwrap_model(model)))
    accelerator.print("losses", losses)
    return losses


if __name__ == "__main__":
    main()
