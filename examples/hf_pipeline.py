"""A Hugging Face pipeline for image classification whose model computes 60% of its multiply-adds.

Run it: python examples/hf_pipeline.py photo.jpg
        python examples/hf_pipeline.py photo.jpg other.jpg --model facebook/deit-small-patch16-224 --method tome
"""

import argparse

from transformers import pipeline

import tokenprune


def main(arguments: list[str] | None = None) -> list[list[dict[str, object]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", default="google/vit-base-patch16-224", help="name on the hub, or a folder")
    parser.add_argument("--method", help="(default: chosen by the budget)")
    parser.add_argument("--flops", type=float, default=0.6, help="(default: %(default)s)")
    options = parser.parse_args(arguments)

    classify = pipeline("image-classification", model=options.model)
    tokenprune.patch(classify.model, options.method, flops=options.flops)
    answers = classify(options.images, top_k=3)
    for image, answer in zip(options.images, answers, strict=True):
        print(image, ", ".join(f"{one['label']} {one['score']:.2f}" for one in answer))
    print(tokenprune.report(classify.model))
    return answers


if __name__ == "__main__":
    main()
