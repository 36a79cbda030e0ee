import json
from importlib import resources

import pytest
import torch

import tokenprune
from tokenprune.evals import digits, digits_swin, train_swin
from tokenprune.evals.digits_swin import CHECKPOINT
from tokenprune.evals.train_digits import accuracy
from tokenprune.evals.train_swin import RECIPE, Recipe, Training

SHIPPED = resources.files("tokenprune.evals") / "checkpoints"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(BaseException):
    pass


def test_a_training_that_was_killed_goes_on_exactly(tmp_path, monkeypatch):
    for name, value in {"LOG_EVERY": 2, "SAVE_EVERY": 1, "BATCH": 4, "VALIDATION_IMAGES": 4, "TEST_IMAGES": 4}.items():
        monkeypatch.setattr(train_swin, name, value)
    tiny = Recipe(((30, 1), (48, 2), (96, 2)))
    straight = train_swin.train(tmp_path / "straight", tiny)
    assert [line["canvas"] for line in straight["log"]] == [48, 96, 96]
    advance = Training.advance

    def killed(self):
        if self.step == 3:
            raise Killed
        advance(self)

    monkeypatch.setattr(Training, "advance", killed)
    with pytest.raises(Killed):
        train_swin.train(tmp_path / "killed", tiny)
    monkeypatch.setattr(Training, "advance", advance)
    torch.rand(7)  # another state of the global generator
    resumed = train_swin.train(tmp_path / "killed", tiny)
    assert resumed["log"] == straight["log"]
    files = [(tmp_path / folder / CHECKPOINT).read_bytes() for folder in ("straight", "killed")]
    assert files[0] == files[1]
    record = json.loads((tmp_path / "killed" / CHECKPOINT).with_suffix(".json").read_text())
    assert record["recipe"] == json.loads(json.dumps(train_swin.recipe_record(tiny)))


def test_all_phases_are_of_the_same_weights_and_windows():
    model = train_swin.trainable()
    names = {name: value.shape for name, value in model.state_dict().items()}
    windows = [block.window_size for stage in model.layers for block in stage.blocks]
    for size in (30, 48, 96):
        train_swin.take(model, size)
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 10)
        assert {name: value.shape for name, value in model.state_dict().items()} == names
        assert [block.window_size for stage in model.layers for block in stage.blocks] == windows
    fresh = digits_swin.digits_swin(pretrained=False)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), fresh(x), rtol=1e-4, atol=1e-5)


def test_the_shipped_model_reads_fresh_test_images_but_not_all():
    model = digits_swin.digits_swin()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    images, labels = digits.cluttered_digits("test", 300, seed=train_swin.SEED + 1, size=digits_swin.IMAGE_SIZE)
    right = accuracy(model, images, labels)
    record = json.loads((SHIPPED / CHECKPOINT).with_suffix(".json").read_text())
    assert 0.70 <= right <= 0.97
    # Four standard errors of 300 images.
    assert abs(right - record["test_accuracy"]) < 0.07


def test_the_checkpoint_is_small_and_its_record_is_that_of_the_committed_recipe():
    assert len((SHIPPED / CHECKPOINT).read_bytes()) <= 4_000_000
    record = json.loads((SHIPPED / CHECKPOINT).with_suffix(".json").read_text())
    assert record["recipe"] == json.loads(json.dumps(train_swin.recipe_record(RECIPE)))
    assert record["data"]["licence"] == "CC BY 4.0"


def test_two_stages_have_windows_to_choose_among():
    model = tokenprune.patch(digits_swin.digits_swin(pretrained=False), "sparsevit", keep=0.5)
    windows = [place["windows_in"] for place in tokenprune.report(model).to_dict()["places"]]
    assert windows == [64, 64, 16, 16, 4, 4, 4, 4]
