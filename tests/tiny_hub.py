"""Small models as folders from which transformers and diffusers load them, with their processors."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import transformers
from denoisers_zoo import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tokenprune.evals import digits_lvlm
from tokenprune.evals.placed_digits import PATCH, PIXEL_MEAN, PIXEL_STD


def save_clip(folder: Path, size: int = 32) -> None:
    """Writes model and processor to `folder`; its tokens are letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    square = {"height": size, "width": size}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    small = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3}
    text = {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **small}
    vision = {"image_size": size, "patch_size": 4, **small}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


def save_lvlm(folder: Path) -> None:
    """The package's small LLaVA, which reads."""
    words = {word: number for number, word in enumerate(digits_lvlm.WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = transformers.CLIPImageProcessor(
        do_resize=False, do_center_crop=False, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    template = "<start> <image> {{ messages[0]['content'][1]['text'] }}"
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, fast, chat_template=template, **settings).save_pretrained(folder)
    model = digits_lvlm.lvlm_digits()
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)


def save_pipeline(folder: Path, clip: Path) -> None:
    """A Stable Diffusion of random weights; clip: a folder of `save_clip`, whose tokens it takes."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip, model_max_length=8)
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    parts = {"vae": vae, "text_encoder": transformers.CLIPTextModel(text), "tokenizer": tokenizer}
    parts |= {"unet": build("unet_sd")[0], "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}
    pipe = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
