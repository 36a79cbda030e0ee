"""The loop of timm's validate.py with a patched model: top-1 and top-5 on a folder with a subfolder for each class.

Run it: python examples/timm_validate.py imagenet/val --model deit_small_patch16_224 --method tome --flops 0.6
"""

import argparse

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy

import tokenprune


@torch.inference_mode()
def validate(model: torch.nn.Module, loader: timm.data.loader.PrefetchLoader, device: str) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent."""
    top1, top5 = AverageMeter(), AverageMeter()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        first, fifth = accuracy(model(images), labels, topk=(1, min(5, model.num_classes)))
        top1.update(first.item(), len(images))
        top5.update(fifth.item(), len(images))
    return top1.avg, top5.avg


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--checkpoint", default="", help="weights (default: the pretrained ones)")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--method", help="(default: chosen by the budget)")
    parser.add_argument("--flops", type=float, default=0.6)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pretrained = not options.checkpoint
    model = timm.create_model(
        options.model, pretrained=pretrained, checkpoint_path=options.checkpoint, num_classes=options.num_classes
    )
    config = resolve_data_config({}, model=model)
    dataset = create_dataset("", root=options.folder, split="validation")
    settings = {"batch_size": options.batch_size, "num_workers": options.workers, "use_prefetcher": False}
    loader = create_loader(dataset, is_training=False, **config, **settings)
    tokenprune.patch(model.to(device).eval(), options.method, flops=options.flops)
    top1, top5 = validate(model, loader, device)
    print(tokenprune.report(model))
    print(f"top-1 {top1:.2f}, top-5 {top5:.2f} of {len(dataset)} images")
    return top1, top5


if __name__ == "__main__":
    main()
