"""Every evaluation of other models and of files that is shared out, small, as `sharded` has those of image towers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny_hub
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

from tokenprune.evals import digits_denoisers, digits_lvlm, generation
from tokenprune.evals.clip import load_clip
from tokenprune.evals.digits_pipelines import pipeline_of
from tokenprune.evals.full_size import clip_score, picture_files
from tokenprune.evals.lvlm_eval import evaluate_lvlm
from tokenprune.evals.models import load_model
from tokenprune.evals.picture_scores import frechet_of_folders, pair_scores
from tokenprune.evals.prompts import evaluate_prompts, load_pipeline
from tokenprune.evals.questions import evaluate_questions, load_lvlm
from tokenprune.evals.retrieval import evaluate_retrieval


def found(folder: Path) -> dict[str, Any]:
    """{what: what was found} of pictures, captions, questions and prompts, in files that are made in `folder`."""
    generator = torch.Generator().manual_seed(4)
    for name, noise in (("one", 0.0), ("other", 0.1)):
        (folder / name).mkdir()
        for number in range(7):
            picture = torch.full((3, 64, 64), number / 9) + noise * torch.rand(3, 64, 64, generator=generator)
            to_pil_image(picture.clamp(0, 1)).save(folder / name / f"{number}.png")
    images = [str(folder / "other" / f"{number}.png") for number in range(7)]
    captions = [{"image": image, "captions": ["a " + "bcdefgh"[i]] * (1 + i % 2)} for i, image in enumerate(images)]
    asked = [{"image": image, "question": "what is ?", "answers": "two"} for image in images]
    for name, records in (("captions", captions), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "prompts.txt").write_text("a fox\na house\na bird\n")
    for name in ("clip", "lvlm"):
        (folder / name).mkdir()
    tiny_hub.save_clip(folder / "clip")
    tiny_hub.save_lvlm(folder / "lvlm")
    tiny_hub.save_pipeline(folder / "pipe", folder / "clip")
    clip, lvlm, settings = load_clip(str(folder / "clip")), load_lvlm(str(folder / "lvlm")), {"baselines": False}
    quarter = {"keep": 0.25}
    tables = {
        "pictures": generation.evaluate_generation(
            pipeline_of(_dit()), ["at_edm"], [{"flops": 0.8}], samples=7, batch_size=2, steps=2
        ),
        "answers": evaluate_lvlm(digits_lvlm.lvlm_digits(), ["top_k"], samples=7, batch_size=2, baselines=False),
        "retrieval": evaluate_retrieval(
            *clip, folder / "captions.jsonl", ["top_k"], [quarter], batch_size=2, **settings
        ),
        "questions": evaluate_questions(*lvlm, folder / "questions.jsonl", ["top_k"], [quarter], **settings),
        "prompts": evaluate_prompts(
            load_pipeline(str(folder / "pipe")), folder / "prompts.txt", ["tomesd"], steps=2, height=32, width=24
        ),
    }
    pairs = pair_scores(folder / "one", folder / "other")
    distance = frechet_of_folders(folder / "one", folder / "other", load_model("digits-vit"), batch_size=2)
    scores = clip_score(picture_files(folder / "one"), list("abcdefg"), model=str(folder / "clip"), batch_size=2)
    told = {"pairs": {name: values.tolist() for name, values in pairs.items()}, "frechet": vars(distance)}
    return {**told, "clip score": scores, **{what: table.rows for what, table in tables.items()}}


def _dit() -> nn.Module:
    torch.manual_seed(0)
    model = digits_denoisers.dit(num_layers=3, num_attention_heads=1)
    for parameter in model.parameters():  # its last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    generation.REAL_IMAGES = 40
    into = Path(sys.argv[1])
    result = found(into)
    (into / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
