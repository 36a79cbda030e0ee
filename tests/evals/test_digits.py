import json
import random
from importlib import resources

import numpy as np
import pytest
import torch

from tokenprune.evals import digits, train_digits
from tokenprune.evals.digits_vit import digits_vit


@pytest.fixture(autouse=True)
def _one_thread():
    # Waiting threads make so small a model slower wherever the cores are shared.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CHECKPOINTS = resources.files("tokenprune.evals") / "checkpoints"


def test_splits_are_disjoint_and_use_every_scan():
    parts = [digits.scan_indices(split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1097, 200, 500]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_answers_and_clutter_come_from_the_scans_of_the_split_alone(split, monkeypatch):
    expected, labels = digits.cluttered_digit_pictures(split, 40)
    scans, answers = (values.copy() for values in digits.scans())
    foreign = np.setdiff1d(np.arange(1797), digits.scan_indices(split))
    scans[foreign], answers[foreign] = np.nan, -1
    monkeypatch.setattr(digits, "scans", lambda: (scans, answers))
    pictures, same_labels = digits.cluttered_digit_pictures(split, 40)
    assert np.array_equal(pictures, expected)
    assert np.array_equal(same_labels, labels)


def test_clutter_is_strips_of_scans(monkeypatch):
    # Guards the test above: were no strip drawn, it could not see one of a foreign split.
    drawn = []
    enlarge = digits.enlarge
    monkeypatch.setattr(digits, "enlarge", lambda ink, *rest: drawn.append(ink.shape) or enlarge(ink, *rest))
    digits.cluttered_digit_pictures("test", 40)
    assert drawn.count((8, 8)) == 40
    assert drawn.count((digits.STRIP_WIDTH, 8)) >= 80


def test_pictures_depend_on_split_seed_and_place_alone():
    pictures, labels = digits.cluttered_digit_pictures("val", 6, seed=3)
    again, same = digits.cluttered_digit_pictures("val", 4, seed=3, start=2)
    assert pictures.shape == (6, 80, 80, 3)
    assert pictures.dtype == np.uint8
    assert np.array_equal(pictures[2:], again)
    assert np.array_equal(labels[2:], same)
    for other in (("val", 4), ("train", 3), ("test", 3)):
        assert not np.array_equal(pictures, digits.cluttered_digit_pictures(other[0], 6, seed=other[1])[0])


def test_global_generators_are_untouched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    digits.cluttered_digits("test", 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


def test_images_are_the_pictures_normalised():
    pictures, labels = digits.cluttered_digit_pictures("test", 5)
    images, targets = digits.cluttered_digits("test", 5)
    assert images.shape == (5, 3, 80, 80)
    assert images.dtype == torch.float32
    restored = (images * digits.PIXEL_STD + digits.PIXEL_MEAN) * 255
    torch.testing.assert_close(restored.permute(0, 2, 3, 1), torch.from_numpy(pictures).float(), rtol=0, atol=1e-3)
    assert torch.equal(targets, torch.from_numpy(labels))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, val, test"):
        digits.cluttered_digits("dev", 1)


def test_the_shipped_model_reads_fresh_test_images_but_not_all():
    model = digits_vit()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    images, labels = digits.cluttered_digits("test", 1000, seed=train_digits.SEED + 1)
    accuracy = train_digits.accuracy(model, images, labels)
    record = json.loads((CHECKPOINTS / "digits_vit.json").read_text())
    assert 0.70 <= accuracy <= 0.97
    # Four standard errors of 1000 images.
    assert abs(accuracy - record["test_accuracy"]) < 0.04


def test_the_checkpoint_is_small_and_its_record_is_that_of_the_committed_recipe():
    assert len((CHECKPOINTS / "digits_vit.safetensors").read_bytes()) <= 4_000_000
    record = json.loads((CHECKPOINTS / "digits_vit.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(train_digits.RECIPE))
    assert record["data"]["licence"] == "CC BY 4.0"
    assert record["normalisation"] == {"mean": digits.PIXEL_MEAN, "std": digits.PIXEL_STD}


def test_training_steps_lower_the_loss():
    torch.manual_seed(0)
    model = train_digits.trainable().train()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = digits.cluttered_digits("train", 16)
    losses = [train_digits.train_step(model, optimizer, images, labels, 1e-3) for _ in range(25)]
    assert np.mean(losses[-3:]) < losses[0] / 2


def test_the_training_writes_a_checkpoint_and_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_digits, "VALIDATION_IMAGES", 20)
    monkeypatch.setattr(train_digits, "TEST_IMAGES", 20)
    monkeypatch.setattr(train_digits, "BATCH", 8)
    train_digits.train(tmp_path, 4)
    assert "step 4/4" in capsys.readouterr().out
    assert json.loads((tmp_path / "digits_vit.json").read_text())["recipe"]["steps"] == 4
    from safetensors.torch import load_file

    model = digits_vit(pretrained=False)
    model.load_state_dict(load_file(tmp_path / "digits_vit.safetensors"))


def test_the_reading_phase_sees_its_canvas_inside_the_window_only():
    window = train_digits._Window(2, 3, 5)
    images, _ = train_digits._batch(0, window)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax(dim=(1, 4, 5))
    assert (patches[:, 2:7, 3:8] > 0).all()
    patches[:, 2:7, 3:8] = 0
    assert (patches == 0).all()
    tokens = torch.arange(101).view(1, 101, 1)
    kept = [0] + [1 + 10 * row + col for row in range(2, 7) for col in range(3, 8)]
    assert window(tokens).flatten().tolist() == kept


def test_the_learning_rate_warms_up_and_comes_down():
    rates = [train_digits.learning_rate(step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(train_digits.PEAK_LR)
    assert rates.index(max(rates)) == 40
    assert rates[-1] < 1.2 * train_digits.LAST_LR
