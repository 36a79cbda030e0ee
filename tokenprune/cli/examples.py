"""What each command's help shows of its use."""

from __future__ import annotations

EXAMPLES = {
    "demo": ["tokenprune demo --output demo-output"],
    "demo-diffusion": ["tokenprune demo-diffusion --checkpoint dit-run --checkpoint unet-run"],
    "methods": ["tokenprune methods", "tokenprune methods --model digits-vit --markdown", "tokenprune methods --table"],
    "doctor": ["tokenprune doctor", "tokenprune doctor --device cuda --dtype bfloat16 --json"],
    "report": [
        "tokenprune report --model digits-vit --flops 0.6",
        "tokenprune report --model vit_small_patch16_224 --random-weights --method tome --keep 0.5 --json",
        "tokenprune report --model lvlm-digits --method fastv --keep 0.25",
    ],
    "bench": [
        "tokenprune bench --model digits-vit --flops 0.6 --batch-size 1 --batch-size 16",
        "tokenprune bench --model vit_small_patch16_224 --random-weights --method tome --flops 0.6 --json",
        "tokenprune bench --model dinov2-small-wheel --batch-size 16 --method tome --flops 0.6 --profile",
        "tokenprune bench --model digits-vit --flops 0.6 --batch-size 1 --batch-size 16 --save-profile",
    ],
    "eval": [
        "tokenprune eval --model digits-vit --method tome --method zero_tprune --flops 0.6",
        "tokenprune eval --model dinov2-small-wheel --flops 0.6 --output dinov2.md",
        "tokenprune eval --model deit_small_patch16_224 --data imagenet/val --samples 5000 --flops 0.6 --csv",
        "tokenprune eval --model dit-digits --checkpoint dit-run --flops 0.7 --rounds 20",
        "tokenprune eval --model lvlm-digits --keep 0.25 --keep 0.5 --rounds 20",
        "tokenprune eval --model clip:openai/clip-vit-base-patch32 --data pets/val --method top_k --flops 0.7",
        "tokenprune eval --model clip:openai/clip-vit-base-patch32 --data captions.jsonl --method top_k --flops 0.7",
        "tokenprune eval --model vlm:llava-hf/llava-1.5-7b-hf --data questions.jsonl --method feather --keep 0.25",
        "tokenprune eval --model pipe:stabilityai/stable-diffusion-2-1 --data prompts.txt --method at_edm --flops 0.8",
    ],
    "compare": [
        "tokenprune compare --model digits-vit --output compared",
        "tokenprune compare --model dit-digits --method at_edm --method tomesd --samples 200 --output drawn",
        "tokenprune compare --model vit_small_patch16_224 --model deit_small_patch16_224 --data imagenet/val"
        " --method tome --method top_k --flops 0.6 --flops 0.5 --image cat.jpg --output compared",
    ],
    "viz": ["tokenprune viz --model digits-vit --method tome --flops 0.6 --output kept.png"],
    "patterns": [
        "tokenprune patterns --model digits-vit --keep 0.5 --keep 0.25 --output patterns",
        "tokenprune patterns --model dinov2-small-wheel --method top_k --method tome --measure kept --output patterns",
        "tokenprune patterns --model vit_tiny_patch16_224 --other vit_small_patch16_224 --data pictures --keep 0.5"
        " --output patterns",
    ],
    "search": [
        "tokenprune search --model digits-vit --method top_k --flops 0.6 --output found",
        "tokenprune search --model dinov2-small-wheel --method tome --speedup 1.5 --threads 2 --output found",
        "tokenprune search --model digits-swin --method sparsevit --speedup 1.3 --output found",
        "tokenprune search --model deit_small_patch16_224 --data pictures --method tome --min-agreement 0.99"
        " --output found",
    ],
    "calibrate": [
        "tokenprune calibrate --model digits-vit --flops 0.6 --output digits-adaptive.json",
        "tokenprune calibrate --model deit_small_patch16_224 --data pictures --method saint --flops 0.7"
        " --restore feature --output saint.json",
    ],
    "score": [
        "tokenprune score --pictures patched --real coco-val --prompts captions.txt",
        "tokenprune score --pictures patched --reference unpatched --real photos --features resnet18",
    ],
    "train": [
        "tokenprune train digits-vit --output digits-run",
        "tokenprune train digits-swin --output swin-run",
        "tokenprune train dit-digits --output dit-run",
        "tokenprune train lvlm-digits --output lvlm-run",
        "tokenprune train digit-masks --output masks-run",
        "tokenprune train digits-vit --method ltmp --flops 0.6 --batch-size 32 --output digits-ltmp",
        "tokenprune train digits-vit --method dynamicvit --flops 0.6 --epochs 4 --batch-size 32 --output dynamicvit",
        "tokenprune train digits-vit --method tnt --option noise=0.3 --flops 0.6 --batch-size 32 --output tnt",
        "tokenprune train digit-masks --method cropr --flops 0.5 --batch-size 32 --epochs 2 --output masks-cropr",
        "tokenprune train deit_small_patch16_224 --method ltmp --data imagenet/train --flops 0.75 --output deit-ltmp",
    ],
}
