"""Zero-shot classes and retrieval, against transformers' own logits and loops."""

import json

import pytest
import torch
import transformers
from PIL import Image
from tiny_hub import save_clip

import tokenprune
from tokenprune import cli
from tokenprune.errors import TokenPruneError
from tokenprune.evals.clip import ZeroShot, class_features, load_clip, pixels
from tokenprune.evals.records import read_records
from tokenprune.evals.retrieval import evaluate_retrieval, read_captions, recalls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("clip")
    save_clip(made)
    return made


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(str(folder))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pets")
    generator = torch.Generator().manual_seed(0)
    for name in ("black_cat", "dog", "eel"):
        (root / name).mkdir()
        for number in range(4):
            noise = torch.randint(256, (40 * 36 * 3,), generator=generator, dtype=torch.uint8)
            Image.frombytes("RGB", (40, 36), bytes(noise.tolist())).save(root / name / f"{number}.png")
    return root


def test_logits_are_those_of_transformers(clip, pictures):
    model, processor = clip
    names = ["cat", "dog", "old eel"]
    images = [Image.open(path) for path in sorted(pictures.rglob("*.png"))[:3]]
    inputs = processor(
        text=[f"a photo of a {name}." for name in names], images=images, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        made = ZeroShot(model, (32, 32), class_features(model, processor, names))
        found = made(torch.stack([pixels(processor)(image) for image in images]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


def test_templates_are_averaged_before_the_cosine(clip):
    model, processor = clip
    one, other, both = (class_features(model, processor, ["cat"], t) for t in (["{} a"], ["{} b"], ["{} a", "{} b"]))
    torch.testing.assert_close(both, torch.nn.functional.normalize(one + other, dim=-1))
    with pytest.raises(TokenPruneError, match="no place"):
        class_features(model, processor, ["cat"], ["a photo"])
    with pytest.raises(TokenPruneError, match="0 class names"):
        class_features(model, processor, [])


def run(capsys, *arguments):
    code = cli.main(["eval", *map(str, arguments), "--quiet", "--threads", "1", "--json"])
    printed, error = capsys.readouterr()
    return (json.loads(printed) if code == 0 else None), error


def test_a_folder_is_classified_by_the_names_of_its_folders(folder, clip, pictures, capsys):
    asked = ["--model", f"clip:{folder}", "--data", pictures, "--method", "top_k", "--keep", "0.5", "--batch-size", "5"]
    table, _ = run(capsys, *asked)
    rows = {row["method"]: row for row in table["rows"]}
    assert list(rows) == ["unpatched", "top_k", "random", "uniform", "smaller input"]
    model, processor = clip
    images = torch.stack([pixels(processor)(Image.open(path)) for path in sorted(pictures.rglob("*.png"))])
    texts = class_features(model, processor, ["black cat", "dog", "eel"])
    expected = {}
    for name, patch in (("unpatched", None), ("top_k", "top_k")):
        made = ZeroShot(model, (32, 32), texts).eval()
        with torch.no_grad():
            if patch:
                tokenprune.patch(made, patch, keep=0.5)
            expected[name] = made(images).argmax(1)
            tokenprune.unpatch(made)
        right = (expected[name] == torch.arange(3).repeat_interleave(4)).double().mean().item()
        assert rows[name]["top1"] == pytest.approx(right)
    assert rows["top_k"]["agreement"] == (expected["top_k"] == expected["unpatched"]).double().mean().item()
    assert rows["top_k"]["flops_ratio"] < 0.9
    assert 0 < rows["top_k"]["cosine"] < 1


def test_recalls_by_hand():
    images = torch.eye(3)
    captions = torch.tensor([[1.0, 0.2, 0.0], [0.9, 1.0, 0.0], [0.0, 0.1, 1.0], [0.5, 1.0, 0.9]])
    found = recalls(images, captions, torch.tensor([0, 0, 1, 2]))
    assert found["text_recall@1"].tolist() == [True, False, False]
    assert found["image_recall@1"].tolist() == [True, False, False, False]
    assert found["text_recall@5"].tolist() == [True] * 3
    few = recalls(torch.eye(12)[:, :6], torch.eye(12)[:, :6], torch.arange(12))
    assert few["image_recall@5"][:6].all()


def test_retrieval_is_that_of_a_loop(folder, clip, pictures, capsys):
    model, processor = clip
    files = sorted(pictures.rglob("*.png"))
    captions = []
    for number, path in enumerate(files):
        mine = [f"a {path.parent.name} {'xyzw'[int(path.stem)]}", f"{path.parent.name} " * int(path.stem) + "."]
        captions.append(mine[: 1 + number % 2])
    records = [{"image": str(f.relative_to(pictures)), "captions": c} for f, c in zip(files, captions, strict=True)]
    told = pictures / "captions.jsonl"
    told.write_text("\n".join(map(json.dumps, records)))
    table = evaluate_retrieval(model, processor, told, ["top_k"], [{"keep": 0.5}], batch_size=5)
    rows = {row["method"]: row for row in table.rows}
    flat = [text for its in captions for text in its]
    owner = torch.tensor([i for i, its in enumerate(captions) for _ in its])
    inputs = processor(text=flat, images=[Image.open(f) for f in files], return_tensors="pt", padding=True)
    with torch.no_grad():
        whole = model(**inputs)
        tokenprune.patch(model, "top_k", keep=0.5)
        pruned = model(**inputs)
        tokenprune.unpatch(model)
    for name, output in (("unpatched", whole), ("top_k", pruned)):
        for row, hits in recalls(output.image_embeds, output.text_embeds, owner).items():
            assert rows[name][row] == pytest.approx(hits.double().mean().item()), (name, row)
    one = "text_recall@1"
    assert rows["top_k"][f"{one}_drop"] == pytest.approx(rows["unpatched"][one] - rows["top_k"][one])
    assert table.environment["captions"] == len(flat) > table.environment["images"] == len(files)
    found, _ = run(capsys, "--model", f"clip:{folder}", "--data", told, "--method", "top_k", "--keep", "0.5")
    shown = {row["method"]: row.get("image_recall@5") for row in found["rows"]}
    assert shown["top_k"] == pytest.approx(rows["top_k"]["image_recall@5"])


def test_bad_files_are_told_by_line(tmp_path, pictures):
    path = tmp_path / "captions.jsonl"
    cases = (
        (None, "cannot be read"),
        ("\n\n", "is empty"),
        ("cat.jpg a cat", "record 1 of .* is no JSON"),
        ('{"image": "cat.jpg"}', "record 1 of .* has no captions; a record is such as"),
        ('{"captions": ["x"]}', "has no image"),
        ('{"image": "cat.jpg", "captions": ["x"]}', "picture that is not there"),
        ("[1]", "has no image and no captions"),
    )
    for text, message in cases:
        if text is not None:
            path.write_text(text)
        with pytest.raises(TokenPruneError, match=message):
            read_captions(path)
    path.write_text(json.dumps({"image": str(pictures / "dog" / "0.png"), "captions": {"en": "x"}}))
    with pytest.raises(TokenPruneError, match="a text or a list of texts"):
        read_captions(path)
    assert read_records(path, "", ("image",))[0]["image"].is_file()


def test_what_does_not_go_together_is_told(folder, pictures, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    model = ["--model", f"clip:{folder}"]
    for arguments, message in (
        (model, "--data"),
        ([*model, "--data", pictures, "--classes", tmp_path / "names.txt"], "names 2 classes, and"),
        ([*model, "--data", tmp_path / "flat"], "--classes FILE"),
        ([*model, "--data", tmp_path / "x.jsonl", "--classes", "f"], "not for captions"),
        ([*model, "--data", tmp_path / "x.jsonl"], "cannot be read"),
        ([*model, "--data", pictures, "--rounds", "20"], "--rounds: only for"),
        (["--model", f"clip:{tmp_path}", "--data", pictures], "could not be loaded"),
        (["--model", "digits-vit", "--classes", "f"], "--classes: only for clip:NAME"),
    ):
        _, error = run(capsys, *arguments)
        assert message in error, error


def test_a_model_without_texts_is_refused(tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **small)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(TokenPruneError, match=r"ViTModel, which puts no images|could not be loaded"):
        load_clip(str(tmp_path))
