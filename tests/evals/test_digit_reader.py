import json
from importlib import resources

import torch

from tokenprune.evals import train_reader
from tokenprune.evals.digit_reader import CHECKPOINT, DigitReader, digit_reader, read
from tokenprune.evals.drawn_digits import drawn_digit_pictures, to_model

CHECKPOINTS = resources.files("tokenprune.evals") / "checkpoints"


def test_the_shipped_reader_reads_fresh_test_pictures():
    pictures, labels, _ = drawn_digit_pictures("test", 500, seed=train_reader.SEED + 1)
    features, digits = read(digit_reader(), to_model(pictures))
    assert features.shape == (500, 64)
    accuracy = (digits == torch.from_numpy(labels)).float().mean().item()
    record = json.loads((CHECKPOINTS / "digit_reader.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(train_reader.RECIPE))
    assert abs(accuracy - record["test_accuracy"]) < 0.04
    assert accuracy > 0.9
    assert len((CHECKPOINTS / CHECKPOINT).read_bytes()) <= 1_000_000


def test_reading_in_parts_is_reading():
    torch.manual_seed(0)
    reader, images = DigitReader().eval(), torch.randn(7, 3, 36, 36)
    features, digits = read(reader, images, batch=3)
    torch.testing.assert_close(features, reader.features(images).detach())
    assert torch.equal(digits, reader(images).argmax(1))


def test_training_depends_on_the_step_alone_and_writes_a_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_reader, "TEST_IMAGES", 10)
    first, second = train_reader.batch(3), train_reader.batch(3)
    assert torch.equal(first[0], second[0])
    train_reader.train(tmp_path, 2)
    assert "step 2/2" in capsys.readouterr().out
    assert json.loads((tmp_path / "digit_reader.json").read_text())["recipe"]["steps"] == 2
