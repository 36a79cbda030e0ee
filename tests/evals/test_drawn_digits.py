import random

import numpy as np
import pytest
import torch

from tokenprune.evals import digits, drawn_digits


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_digits_come_from_the_scans_of_the_split_alone(split, monkeypatch):
    expected, labels, _ = drawn_digits.drawn_digit_pictures(split, 40)
    scans, answers = (values.copy() for values in digits.scans())
    foreign = np.setdiff1d(np.arange(1797), digits.scan_indices(split))
    scans[foreign], answers[foreign] = np.nan, -1
    monkeypatch.setattr(drawn_digits, "scans", lambda: (scans, answers))
    pictures, same_labels, _ = drawn_digits.drawn_digit_pictures(split, 40)
    assert np.array_equal(pictures, expected)
    assert np.array_equal(same_labels, labels)


def test_pictures_depend_on_split_seed_size_and_place_alone():
    pictures, labels, centres = drawn_digits.drawn_digit_pictures("val", 6, seed=3)
    again = drawn_digits.drawn_digit_pictures("val", 4, seed=3, start=2)
    assert pictures.shape == (6, 36, 36, 3)
    assert pictures.dtype == np.uint8
    for whole, part in zip((pictures, labels, centres), again, strict=True):
        assert np.array_equal(whole[2:], part)
    for split, seed in (("val", 4), ("train", 3), ("test", 3)):
        assert not np.array_equal(pictures, drawn_digits.drawn_digit_pictures(split, 6, seed=seed)[0])
    assert drawn_digits.drawn_digit_pictures("val", 1, size=20)[0].shape == (1, 20, 20, 3)


def test_centres_are_where_the_ink_is(monkeypatch):
    pictures, _, centres = drawn_digits.drawn_digit_pictures("train", 30)
    monkeypatch.setattr(drawn_digits, "paint", lambda *arguments: None)
    empty, _, same = drawn_digits.drawn_digit_pictures("train", 30)
    assert np.array_equal(centres, same)
    ink = np.abs(pictures.astype(float) - empty).sum(axis=3)
    axis = np.arange(36) + 0.5
    for picture, centre in zip(ink, centres, strict=True):
        weight = picture.sum()
        assert weight > 0
        found = (picture.sum(1) @ axis / weight, picture.sum(0) @ axis / weight)
        np.testing.assert_allclose(found, centre, atol=3.5)


def test_the_models_space_is_standardised_and_inverts():
    pictures, _, _ = drawn_digits.drawn_digit_pictures("train", 200)
    images = drawn_digits.to_model(pictures)
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1
    restored = drawn_digits.to_pixels(images).permute(0, 2, 3, 1) * 255
    torch.testing.assert_close(restored, torch.from_numpy(pictures).float(), rtol=0, atol=1e-3)
    assert drawn_digits.to_pixels(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


def test_global_generators_are_untouched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    drawn_digits.drawn_digit_pictures("test", 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
