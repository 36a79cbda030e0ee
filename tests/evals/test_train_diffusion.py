import itertools
import json

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed

from tokenprune.errors import TokenPruneError
from tokenprune.evals import digits_denoisers, train_diffusion
from tokenprune.evals.train_diffusion import Recipe, Training

NAMES = tuple(digits_denoisers.CHECKPOINTS)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in {"BATCH": 2, "VALIDATION_IMAGES": 2, "VALIDATE_EVERY": 2, "SAVE_EVERY": 1}.items():
        monkeypatch.setattr(train_diffusion, name, value)
    dit, unet = digits_denoisers.dit, digits_denoisers.unet
    monkeypatch.setattr(digits_denoisers, "dit", lambda: dit(num_layers=1, num_attention_heads=1))
    monkeypatch.setattr(digits_denoisers, "unet", lambda: unet(block_out_channels=(8, 16), attention_head_dim=1))
    yield
    torch.set_num_threads(threads)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_a_training_that_was_killed_goes_on_exactly(name, tmp_path, monkeypatch):
    recipe = Recipe(3, 3, 1e-3)
    straight = train_diffusion.train(name, tmp_path / "straight", recipe)
    advance = Training.advance

    def killed_in_step_five(self):
        if self.step == 4:
            raise Killed
        advance(self)

    monkeypatch.setattr(Training, "advance", killed_in_step_five)
    with pytest.raises(Killed):
        train_diffusion.train(name, tmp_path / "killed", recipe)
    assert not (tmp_path / "killed" / digits_denoisers.CHECKPOINTS[name]).exists()
    monkeypatch.setattr(Training, "advance", advance)
    torch.rand(7)  # another state of the global generator
    resumed = train_diffusion.train(name, tmp_path / "killed", recipe)
    assert resumed["log"] == straight["log"]
    files = [(tmp_path / folder / digits_denoisers.CHECKPOINTS[name]).read_bytes() for folder in ("straight", "killed")]
    assert files[0] == files[1]


def test_the_state_of_another_model_is_refused(tmp_path):
    train_diffusion.train(NAMES[0], tmp_path, Recipe(1, 0, 1e-3))
    with pytest.raises(TokenPruneError, match="output of its own"):
        train_diffusion.train(NAMES[1], tmp_path, Recipe(1, 0, 1e-3))


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    first = train_diffusion.train(NAMES[0], tmp_path, Recipe(1, 1, 1e-3))
    monkeypatch.setattr(Training, "advance", None)
    assert train_diffusion.train(NAMES[0], tmp_path, Recipe(1, 1, 1e-3)) == first


def test_a_kill_while_the_state_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    training = Training(NAMES[0], Recipe(2, 0, 1e-3))
    training.save(tmp_path / "state.pt")
    written = (tmp_path / "state.pt").read_bytes()
    training.advance()

    def killed(state, path):
        path.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(Killed):
        training.save(tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == written


def test_a_window_has_the_positions_of_its_place_in_the_whole():
    embed = PatchEmbed(height=36, width=36, patch_size=2, in_channels=3, embed_dim=16)
    model = torch.nn.Module()
    model.pos_embed = embed
    images = torch.randn(2, 3, 36, 36)
    whole = embed(images).view(2, 18, 18, 16)
    with train_diffusion._window(model, 3, 5, 10):
        small = embed(images[:, :, 6:26, 10:30])
    torch.testing.assert_close(small.view(2, 10, 10, 16), whole[:, 3:13, 5:15])
    torch.testing.assert_close(embed(images).view(2, 18, 18, 16), whole)


@pytest.mark.parametrize("name", ["dit-digits", pytest.param("unet-digits", marks=pytest.mark.full)])
def test_steps_on_either_canvas_lower_the_loss(name, monkeypatch):
    monkeypatch.setattr(train_diffusion, "WARMUP_STEPS", 5)
    monkeypatch.setattr(train_diffusion, "BATCH", 8)
    for small, size in ((20, train_diffusion.SMALL_SIZE), (0, train_diffusion.IMAGE_SIZE)):
        training = Training(name, Recipe(small, 20 - small, 5e-3))
        with torch.no_grad():
            before = train_diffusion.loss(training.model, "val", 0, 16, size)
        for _ in range(20):
            training.advance()
        assert {line["canvas"] for line in training.log} == {size}
        with torch.no_grad():
            assert train_diffusion.loss(training.model, "val", 0, 16, size) < 0.9 * before


def test_the_average_follows_the_weights_and_validation_uses_it(monkeypatch):
    training = Training(NAMES[0], Recipe(4, 0, 1e-3))
    before = {key: value.clone() for key, value in training.average.items()}
    training.advance()
    after = training.model.state_dict()
    for key, value in training.average.items():
        torch.testing.assert_close(value, before[key].lerp(after[key], 1 - 1 / 11))
    weights = training.averaged().state_dict()
    assert all(torch.equal(weights[key], value) for key, value in training.average.items())


def test_the_learning_rate_warms_up_stays_and_comes_down():
    recipe = Recipe(600, 400, 2e-3)
    rates = [train_diffusion.learning_rate(step, recipe) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-3 / train_diffusion.WARMUP_STEPS)
    assert rates[100:750] == [2e-3] * 650
    assert rates[-1] < 0.03 * 2e-3
    assert all(a > b for a, b in itertools.pairwise(rates[750:]))


def test_labels_are_dropped_in_training_only(monkeypatch):
    seen = []
    predict = train_diffusion.predict

    def spy(model, images, timestep, labels, centres=None):
        seen.append((labels.clone(), centres is None))
        return predict(model, images, timestep, labels, centres)

    monkeypatch.setattr(train_diffusion, "predict", spy)
    model = digits_denoisers.unet()
    with torch.no_grad():
        for step in range(20):
            train_diffusion.loss(model, "train", step, 10, 36)
        drops = torch.cat([labels for labels, _ in seen]) == digits_denoisers.UNCONDITIONAL
        assert 0.04 < drops.float().mean() < 0.17
        assert 2 <= sum(placeless for _, placeless in seen) <= 11
        seen.clear()
        train_diffusion.loss(model, "val", 0, 60, 36)
    assert (seen[0][0] < 10).all()


def test_the_command_writes_a_checkpoint_and_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_diffusion, "RECIPES", {name: Recipe(1, 1, 1e-3) for name in NAMES})
    train_diffusion.main(["unet-digits", "--output", str(tmp_path)])
    assert "step 2/2" in capsys.readouterr().out
    record = json.loads((tmp_path / "unet_digits.json").read_text())
    assert record["recipe"]["small_canvas"] == {"size": 20, "steps": 1}
    assert (tmp_path / "unet_digits.safetensors").exists()
