import numpy as np
import pytest

from tokenprune.evals import placed_digits as module
from tokenprune.evals.digits import scan_indices, scans
from tokenprune.evals.placed_digits import COLOURS, GRID, NOTHING, PATCH, placed_digits


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_digits_are_of_the_splits_own_scans_and_the_ones_that_are_named(split, monkeypatch):
    seen, enlarge = [], module.enlarge

    def spy(ink, *arguments):
        seen.append(ink)
        return enlarge(ink, *arguments)

    monkeypatch.setattr(module, "enlarge", spy)
    scenes = placed_digits(split, 20)
    ink, labels = scans()
    own = {ink[i].tobytes(): labels[i] for i in scan_indices(split)}
    assert [own[one.tobytes()] for one in seen] == scenes.digits.flatten().tolist()


def test_a_scene_depends_on_its_number_alone():
    together, alone = placed_digits("val", 5, seed=3), placed_digits("val", 1, seed=3, start=4)
    for name in ("pictures", "digits", "colours", "rows", "columns", "patches"):
        assert np.array_equal(getattr(together, name)[4:], getattr(alone, name))
    assert not np.array_equal(together.pictures, placed_digits("val", 5, seed=4).pictures)
    assert not np.array_equal(together.pictures, placed_digits("test", 5, seed=3).pictures)


def test_what_is_said_of_a_scene_is_seen_in_it():
    scenes = placed_digits("test", 40)
    colours = np.array(list(COLOURS.values()))
    for facts in (scenes.digits, scenes.colours, 4 * scenes.rows + scenes.columns):
        assert all(len(set(row)) == 3 for row in facts.tolist())
    right = 0
    for n, i in np.ndindex(40, 3):
        y, x = np.nonzero(scenes.patches[n] == i)
        # The middle of a digit's patches lies in its cell of two by two patches.
        assert abs(y.mean() - (2 * scenes.rows[n, i] + 0.5)) < 1.01
        assert abs(x.mean() - (2 * scenes.columns[n, i] + 0.5)) < 1.01
        pixels = scenes.pictures[n].reshape(GRID, PATCH, GRID, PATCH, 3)[y, :, x].reshape(-1, 3) / 255
        ink = pixels[pixels.sum(1) >= np.quantile(pixels.sum(1), 0.95)].mean(0)
        likeness = (colours @ ink) / np.linalg.norm(colours, axis=1)
        right += likeness.argmax() == scenes.colours[n, i]
    assert right >= 114
    assert 0.4 < (scenes.patches == NOTHING).mean() < 0.9
