"""LoRA on a patched ViT with PEFT: the adapters are trained on the tokens that are left, then merged and unpatched.

Run it: python examples/peft_lora.py
"""

import timm
import torch
from peft import LoraConfig, get_peft_model

import tokenprune

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "proj"], init_lora_weights="gaussian")


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int = 3) -> list[float]:
    """A few steps on one batch; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=10)
    tokenprune.patch(vit, "top_k", keep=0.5)  # after get_peft_model it is the same: patch(peft_model, ...)
    peft_model = get_peft_model(vit, LORA)
    peft_model.print_trainable_parameters()
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    print("losses", train(peft_model, images, labels))
    merged = peft_model.merge_and_unload()
    print(tokenprune.report(merged))
    tokenprune.unpatch(merged)  # the fine-tuned ViT, on all its tokens
    print(merged(images).shape)


if __name__ == "__main__":
    main()
