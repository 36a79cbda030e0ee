import itertools
import json

import pytest
import torch

from tokenprune import cli
from tokenprune.errors import TokenPruneError
from tokenprune.evals import digits_lvlm, train_lvlm
from tokenprune.evals.lvlm_losses import Batch, Heads, answer_loss, rolled_back
from tokenprune.evals.placed_digits import GRID, PATCH, placed_digits
from tokenprune.evals.train_lvlm import Recipe, Training

LVLM = digits_lvlm.lvlm
TINY = Recipe(3, 3, tower_batch=2, answer_batch=2, place_layer=1, place_from=1, colours_until=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in {"VALIDATION_SCENES": 2, "VALIDATE_EVERY": 2, "SAVE_EVERY": 1}.items():
        monkeypatch.setattr(train_lvlm, name, value)
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    monkeypatch.setattr(digits_lvlm, "lvlm", lambda: LVLM(small, small))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", [2, 5])
def test_a_training_that_was_killed_goes_on_exactly(last, tmp_path, monkeypatch):
    straight = train_lvlm.train(tmp_path / "straight", TINY)
    advance = Training.advance

    def killed(self):
        if self.step == last:
            raise Killed
        advance(self)

    monkeypatch.setattr(Training, "advance", killed)
    with pytest.raises(Killed):
        train_lvlm.train(tmp_path / "killed", TINY)
    assert not (tmp_path / "killed" / digits_lvlm.CHECKPOINT).exists()
    monkeypatch.setattr(Training, "advance", advance)
    torch.rand(7)  # another state of the global generator
    resumed = train_lvlm.train(tmp_path / "killed", TINY)
    assert resumed["log"] == straight["log"]
    files = [(tmp_path / folder / digits_lvlm.CHECKPOINT).read_bytes() for folder in ("straight", "killed")]
    assert files[0] == files[1]
    record = json.loads((tmp_path / "killed" / digits_lvlm.CHECKPOINT).with_suffix(".json").read_text())
    assert record["recipe"] == train_lvlm.recipe_record(TINY)


def test_the_tower_learns_first_and_is_frozen_then():
    training = Training(TINY)
    parts = training.model.model.vision_tower, training.model.model.language_model
    for step in range(TINY.steps):
        before = [[p.clone() for p in part.parameters()] for part in parts]
        training.advance()
        learns = [
            any(not torch.equal(old, new) for old, new in zip(was, part.parameters(), strict=True))
            for was, part in zip(before, parts, strict=True)
        ]
        assert learns == [step < TINY.tower_steps, step >= TINY.tower_steps]


def test_the_state_of_another_model_is_refused(tmp_path, monkeypatch):
    Training(TINY).save(tmp_path / "state.pt")
    monkeypatch.setattr(digits_lvlm, "lvlm", LVLM)
    with pytest.raises(TokenPruneError, match="output of its own"):
        Training(TINY).resume(tmp_path / "state.pt")


@pytest.mark.parametrize("by_colour", [False, True])
def test_questions_of_one_picture_are_answered_as_if_each_were_alone(by_colour):
    model, batch = _rough(), Batch.of(placed_digits("val", 3))
    heads = Heads(32, 32)
    with torch.no_grad():
        together, _, shares = answer_loss(model, heads, batch, (0, 0), 1, by_colour=by_colour)
        losses, right = [], {"recognition": [], "localisation": []}
        asked = [("recognition", digits_lvlm.what_is_there(3), digits_lvlm.names(batch.digits))]
        if by_colour:
            asked = [
                ("recognition", digits_lvlm.what_is(batch.colours[:, i]), digits_lvlm.names(batch.digits[:, i : i + 1]))
                for i in range(3)
            ]
        for i in range(3):
            places = digits_lvlm.place_answer(batch.rows[:, i], batch.columns[:, i])
            asked.append(("localisation", digits_lvlm.where_is(batch.digits[:, i]), places))
        for name, question, answer in asked:
            ids = digits_lvlm.prompts(torch.cat([question, answer[:, :-1]], 1))
            logits = model(input_ids=ids, pixel_values=batch.images).logits[:, -answer.shape[1] :]
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), answer, reduction="none"))
            hit = (logits.argmax(-1) == answer)[:, :-1]
            right[name].append(hit.all(1) if name == "localisation" else hit.flatten())
    torch.testing.assert_close(together, torch.cat(losses, 1).mean())
    for name, found in right.items():
        assert shares[name] == pytest.approx(torch.cat(found).float().mean().item())


def test_rolled_features_are_those_of_a_tower_whose_positions_are_rolled():
    model, images = _rough(), Batch.of(placed_digits("val", 2)).images
    tower, roll = model.model.vision_tower, (3, 6)

    def features(pixels):
        return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    with torch.no_grad():
        rolled = features(images.roll((roll[0] * PATCH, roll[1] * PATCH), (2, 3)))
        found = rolled_back(rolled, roll)
        table = tower.embeddings.position_embedding.weight
        grid = table[1:].view(GRID, GRID, -1)
        table[1:] = grid.roll((-roll[0], -roll[1]), (0, 1)).flatten(0, 1)
        torch.testing.assert_close(found, features(images), rtol=1e-4, atol=1e-4)


def test_the_learning_rate_rises_and_falls_in_each_stage():
    recipe = Recipe(1000, 500, peak_lr=2e-3)
    rates = [train_lvlm.learning_rate(step, recipe) for step in range(recipe.steps)]
    for part, flat in ((rates[:1000], 700), (rates[1000:], 350)):
        assert part[0] == pytest.approx(2e-3 / train_lvlm.WARMUP_STEPS)
        assert part[100:flat] == [2e-3] * (flat - 100)
        assert part[-1] < 0.03 * 2e-3
        assert all(a > b for a, b in itertools.pairwise(part[flat:]))


def test_the_command_writes_a_checkpoint_and_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lvlm.train, "__defaults__", (TINY,))
    assert cli.main(["train", "lvlm-digits", "--output", str(tmp_path)]) == 0
    assert "step 6" in capsys.readouterr().out
    assert (tmp_path / digits_lvlm.CHECKPOINT).exists()
    assert digits_lvlm.lvlm_digits(tmp_path).training is False


def _rough():
    """A model whose answers depend on everything."""
    torch.manual_seed(0)
    model = digits_lvlm.lvlm()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model
