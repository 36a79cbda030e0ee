import sys

import pytest
import torch
import torch_fidelity
from PIL import Image

from tokenprune import cli
from tokenprune.errors import TokenPruneError
from tokenprune.evals import full_size


@pytest.fixture
def pictures(tmp_path):
    for index, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        Image.new("RGB", (40, 32), colour).save(tmp_path / f"{index}.png")
    return tmp_path


@pytest.fixture
def tiny_clip(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    tokens = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abdeglnru")]
    (folder / "vocab.json").write_text(str({token: i for i, token in enumerate(tokens)}).replace("'", '"'))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **small}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={"image_size": 16, "patch_size": 8, **small}, projection_dim=8
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        model.visual_projection.weight.neg_()  # as drawn, every cosine is below zero, where scores are cut off
    model.save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_each_picture_with_its_own_prompt(pictures, tiny_clip):
    import transformers

    prompts, files = ["red", "green", "a blue bear"], full_size.picture_files(pictures)
    scores = full_size.clip_score(files, prompts, model=str(tiny_clip), batch_size=2)
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(tiny_clip)
    with torch.no_grad():
        for score, file, prompt in zip(scores, files, prompts, strict=True):
            output = model(**processor(text=[prompt], images=[Image.open(file)], return_tensors="pt"))
            cosine = (output.logits_per_image / model.logit_scale.exp()).clamp(min=0).item()
            assert score == pytest.approx(cosine, abs=1e-5)
    assert len(set(scores)) > 1


def test_what_cannot_be_had_is_said(pictures, tmp_path, monkeypatch, capsys):
    with pytest.raises(TokenPruneError, match="one prompt a picture"):
        full_size.clip_score(full_size.picture_files(pictures), ["red"])
    with pytest.raises(TokenPruneError, match="could not be loaded"):
        full_size.clip_score(full_size.picture_files(pictures), ["red"] * 3, model=str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenPruneError, match="no pictures"):
        full_size.inception_fid(pictures, tmp_path / "empty")
    assert cli.main(["score", "--pictures", str(pictures)]) == 1
    assert "--real FOLDER" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"tokenprune-torch\[fid\]"):
        full_size.inception_fid(pictures, pictures)


def test_fid_is_what_torch_fidelity_says(pictures, monkeypatch):
    asked = {}

    def calculate(**options):
        asked.update(options)
        return {"frechet_inception_distance": 12.5}

    monkeypatch.setattr(torch_fidelity, "calculate_metrics", calculate)
    assert full_size.inception_fid(pictures, pictures, weights="w.pth") == 12.5
    assert asked["fid"] is True
    assert asked["input1"] == asked["input2"] == str(pictures)
    assert asked["feature_extractor_weights_path"] == "w.pth"


def test_missing_inception_weights_are_said(pictures, tmp_path):
    with pytest.raises(TokenPruneError, match="weights=FILE"):
        full_size.inception_fid(pictures, pictures, weights=tmp_path / "nothing.pth")
