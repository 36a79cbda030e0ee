"""The restoration network, what it is trained on, and what adawpt has learned for it."""

from __future__ import annotations

import json
import math
from importlib import resources

import pytest
import torch

import tokenprune
from tokenprune.evals import local_blur, train_adawpt, train_deblur
from tokenprune.evals.deblur_quality import compare
from tokenprune.evals.deblur_swin import CHECKPOINT, DeblurSwin, deblur_swin
from tokenprune.evals.local_blur import PHOTOGRAPHS, SIGMA, blur, locally_blurred, psnr
from tokenprune.learned_parts import load_learned

SHIPPED = resources.files("tokenprune.evals") / "checkpoints"
WEIGHTS = "deblur-swin-adawpt-0.5"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(BaseException):
    pass


def test_crops_are_blurred_within_the_outline_alone():
    crops = locally_blurred("test", 6, 3, size=64)
    assert torch.equal(crops.images.movedim(1, -1)[~crops.mask], crops.sharp.movedim(1, -1)[~crops.mask])
    assert 0.3 <= crops.mask.float().mean((1, 2)).min() <= crops.mask.float().mean((1, 2)).max() <= 0.5
    assert (crops.images != crops.sharp).any(1)[crops.mask].float().mean() > 0.8
    assert torch.equal(crops.images, (crops.images * 255).round() / 255)
    again = locally_blurred("test", 2, 3, start=4, size=64)
    assert torch.equal(again.images, crops.images[4:])
    names = [name for split in PHOTOGRAPHS.values() for name in split]
    assert len(set(names)) == len(names)


def test_crops_of_several_splits_are_of_all_of_their_photographs():
    sources = set(locally_blurred(("train", "more"), 60, 2, size=16).sources)
    assert sources == {*PHOTOGRAPHS["train"], *PHOTOGRAPHS["more"]}


def test_predictors_are_told_what_the_blur_moved_and_what_the_network_gains():
    sharp = torch.full((1, 3, 2, 2), 0.5)
    images = sharp.clone()
    images[0, 1, 0] += torch.tensor([1.0, 2.0]) / 255
    mask = torch.tensor([[[True, True], [False, False]]])
    drawn = local_blur.Blurred(images, sharp, mask, ("one",))
    assert train_adawpt.visible(drawn).tolist() == [[[False, True], [False, False]]]
    restored = sharp.clone()
    restored[0, :, 1, 1] += 0.1
    gains = train_adawpt.gained(drawn, restored)[0]
    assert torch.allclose(gains * 255**2, torch.tensor([[1.0, 4.0], [0.0, -3 * 25.5**2]]), rtol=1e-3)


def test_the_blur_is_a_gaussian():
    spot = torch.zeros(1, 1, 13, 13)
    spot[0, 0, 6, 6] = 1.0
    weights = [math.exp(-(d**2) / (2 * SIGMA**2)) for d in range(-4, 5)]
    blurred = blur(spot)[0, 0]
    for y in range(13):
        for x in range(13):
            inside = abs(y - 6) <= 4 and abs(x - 6) <= 4
            expected = weights[y - 2] * weights[x - 2] / sum(weights) ** 2 if inside else 0.0
            assert blurred[y, x].item() == pytest.approx(expected, abs=1e-7)
    assert torch.allclose(blur(torch.full((1, 3, 12, 14), 0.3)), torch.tensor(0.3))


def test_psnr_is_of_the_mask_alone():
    sharp = torch.zeros(1, 3, 4, 4)
    images, mask = sharp.clone(), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2] = True
    images[0, :, 0] = 0.1
    images[0, :, 3] = 0.9
    assert psnr(images, sharp, mask).item() == pytest.approx(-10 * math.log10(0.01 / 2), rel=1e-5)
    assert psnr(images - 5, sharp, mask).item() == math.inf  # clamped to what an image can show


@pytest.mark.full
def test_trainings_that_were_killed_go_on_exactly(tmp_path, monkeypatch):
    small = {"BATCH": 2, "CROP": 16, "LOG_EVERY": 2, "SAVE_EVERY": 1, "IMAGE_SIZE": 32}
    for module in (train_deblur, train_adawpt):
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
    more = {"SCALING_CROPS": 2, "VALIDATION_CROPS": 2, "TEST_CROPS": 2}
    for name, value in more.items():
        monkeypatch.setattr(train_deblur, name, value)
    monkeypatch.setattr(train_adawpt, "CALIBRATION_CROPS", 2)
    for module, files in (
        (train_deblur, (CHECKPOINT,)),
        (train_adawpt, ("learned.safetensors",)),
    ):
        name = module.__name__.rsplit(".", 1)[1]
        module.train(tmp_path / f"{name}-straight", 3)
        advance = module.Training.advance

        def killed(self, advance=advance):
            if self.step == 2:
                raise Killed
            advance(self)

        monkeypatch.setattr(module.Training, "advance", killed)
        with pytest.raises(Killed):
            module.train(tmp_path / f"{name}-killed", 3)
        monkeypatch.setattr(module.Training, "advance", advance)
        torch.rand(7)  # another state of the global generator
        module.train(tmp_path / f"{name}-killed", 3)
        for file in files:
            straight, resumed = ((tmp_path / f"{name}-{one}" / file).read_bytes() for one in ("straight", "killed"))
            assert straight == resumed


def test_the_checkpoint_is_of_the_committed_recipe():
    assert len((SHIPPED / CHECKPOINT).read_bytes()) <= 4_000_000
    record = json.loads((SHIPPED / CHECKPOINT).with_suffix(".json").read_text())
    assert record["recipe"] == json.loads(json.dumps(train_deblur.recipe_record(train_deblur.STEPS)))
    assert record["data"]["photographs"] == list(PHOTOGRAPHS["train"])
    found = load_learned(WEIGHTS).found
    assert (found["flops"], found["steps"], found["seed"]) == (0.5, train_adawpt.STEPS, train_adawpt.SEED)
    assert abs(found["flops_ratio"] - 0.5) < 0.01


def test_a_window_that_all_blocks_pass_through_keeps_its_pixels():
    model, crops = deblur_swin(), locally_blurred("test", 2, 5, size=64)
    with torch.inference_mode():
        tokenprune.patch(model, "adawpt", flops=0.5)
        with tokenprune.record(model) as recording:
            restored = model(crops.images)
    touched = torch.stack([place.source >= 0 for place in recording.forwards[0].places]).any(0).view(-1, 32, 32)
    pixels = touched.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert 0.2 < pixels.float().mean() < 0.9
    assert torch.equal(restored.movedim(1, -1)[~pixels], crops.images.movedim(1, -1)[~pixels])


@pytest.mark.full
def test_half_of_the_multiply_adds_restore_as_well():
    rows = {row["network"]: row for row in compare(deblur_swin(), locally_blurred("test", 10, 7, size=192), flops=0.5)}
    assert rows["unpatched"]["gain"] > 3.0
    assert rows["adawpt"]["flops"] == pytest.approx(0.5, abs=0.06)
    assert rows["adawpt"]["loss"] < rows["random"]["loss"] / 2
    assert rows["random"]["loss"] > 1.0


def test_an_untrained_network_changes_nothing():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeblurSwin()
    x = torch.rand(1, 3, 20, 32)
    assert torch.equal(model(x), x)
    assert local_blur.outline(20, 0.4, torch.Generator().manual_seed(1)).float().mean().item() == pytest.approx(0.4)
