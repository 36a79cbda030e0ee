"""A real vision-language model, asked once as it is and once with a quarter of its visual tokens.

Needs the network for the checkpoint. Run it:

    python examples/vlm_checkpoint.py photo.jpg "What is on the table?"
    python examples/vlm_checkpoint.py photo.jpg "Where is the cup?" --model llava-hf/llava-1.5-7b-hf --method feather
"""

import argparse
import time
from typing import Any

import torch

import tokenprune


def ask(model: Any, processor: Any, image: Any, question: str, tokens: int) -> tuple[str, float]:
    """(answer, seconds), greedy."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt").to(model.device, model.dtype)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - start  # the answer's last token has been waited for
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0], seconds


def compare(
    model: Any, processor: Any, image: Any, question: str, method: str, keep: float, tokens: int = 64
) -> tuple[str, str]:
    """Print and return the answers without and with a patch."""
    ask(model, processor, image, question, 1)  # the first call of all is slower
    plain, before = ask(model, processor, image, question, tokens)
    with tokenprune.patched(model, method, keep=keep):
        answer, after = ask(model, processor, image, question, tokens)
        print(tokenprune.report(model))
    print(f"as it is, {before:.2f} s: {plain}\n{method}, {after:.2f} s: {answer}")
    return plain, answer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct")
    parser.add_argument("--method", default="top_k")
    parser.add_argument("--keep", type=float, default=0.25)
    options = parser.parse_args(arguments)

    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    image = Image.open(options.image).convert("RGB")
    compare(model, processor, image, options.question, options.method, options.keep)


if __name__ == "__main__":
    main()
