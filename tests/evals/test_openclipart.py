"""A tree of drawings made here: folders, variants of a drawing, links, empty and transparent pages."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tokenprune.evals import openclipart as module
from tokenprune.evals.openclipart import openclipart

FOLDERS = ("shapes/round", "shapes/square", "things")


def scribble(path, seed, colour=(200, 30, 40, 255), page=(90, 60)):
    """Random boxes in one corner of a transparent page; the same seed in another colour is a variant."""
    random_boxes = random.Random(seed)
    image = Image.new("RGBA", page, (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = random_boxes.randrange(40), random_boxes.randrange(40)
        draw.rectangle((left, top, left + random_boxes.randrange(2, 16), top + random_boxes.randrange(2, 16)), colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


WORDS = ("oak", "elm", "fir", "yew", "ash", "fig", "bay", "box", "may", "rue", "tea", "pea")


@pytest.fixture
def tree(tmp_path):
    for index, folder in enumerate(FOLDERS):
        for number, word in enumerate(WORDS):
            scribble(tmp_path / folder / f"{word}{'abc'[index]}_01.png", 100 * index + number)
    return tmp_path


def load(tree, **options):
    return openclipart(tree, size=28, folders=FOLDERS, **{"per_class": 50, **options})


def test_shapes_labels_and_split(tree):
    drawings = load(tree)
    assert drawings.images.shape == (36, 3, 28, 28)
    assert drawings.images.dtype == torch.uint8
    assert drawings.labels.bincount().tolist() == [12, 12, 12]
    assert drawings.classes == FOLDERS
    assert len(set(drawings.groups.tolist())) == 36
    for label in range(3):
        assert int(drawings.is_test[drawings.labels == label].sum()) == 3  # 30% of 12, rounded down


def test_transparency_is_white_and_empty_margins_are_cut(tree):
    image = load(tree).images[0]
    assert int(image.amin()) < 60
    assert bool((image == 255).all(0).any())
    # The drawing reaches two opposite sides of the square, though it was a stamp on a page.
    ink = (image.float().mean(0) < 200).nonzero()
    assert 27 in (ink.max(0).values - ink.min(0).values).tolist()


def test_the_same_seed_draws_the_same_and_another_another(tree):
    first, again, other = (load(tree, per_class=6, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    assert not torch.equal(first.images, other.images)
    assert first.labels.bincount().tolist() == [6, 6, 6]


def test_neither_the_global_generators_nor_the_order_of_the_disk_matter(tree):
    state, expected = random.getstate(), torch.get_rng_state()
    load(tree)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("seed", range(8))
def test_variants_of_a_drawing_stay_on_one_side(tree, seed):
    for number, word in enumerate(WORDS):
        scribble(tree / FOLDERS[0] / f"{word}a_bw_02.png", 900 + number)  # by name: another look
        scribble(tree / FOLDERS[1] / f"renamed{chr(97 + number)}q.png", 100 + number, (20, 60, 250, 255))  # by look
        scribble(tree / FOLDERS[2] / f"copy{chr(97 + number)}q.png", number)  # by look, in another folder
    drawings = load(tree, seed=seed)
    assert len(drawings.images) == 72
    sizes = drawings.groups.bincount()
    assert sorted(sizes[sizes > 0].tolist()) == [1] * 12 + [2] * 12 + [3] * 12
    sides = {(int(group), bool(test)) for group, test in zip(drawings.groups, drawings.is_test, strict=True)}
    assert len(sides) == 36
    assert 0 < int(drawings.is_test.sum()) < 36


def test_links_empty_pages_and_huge_drawings_are_left_out(tree, monkeypatch):
    folder = tree / FOLDERS[0]
    (folder / "link.png").symlink_to(folder / "oaka_01.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "empty.png")
    Image.new("RGB", (20, 20), "white").save(folder / "blank.png")
    scribble(folder / "huge.png", 7, page=(2000, 1000))
    monkeypatch.setattr(module, "_MOST_PIXELS", 1_000_000)
    assert len(load(tree).images) == 36
    monkeypatch.setattr(module, "_MOST_PIXELS", 2_000_000)
    assert len(load(tree).images) == 37


def test_folders_below_count_and_paletted_drawings_load(tree):
    deep = tree / FOLDERS[0] / "deep" / "deeper" / "quince.png"
    scribble(deep, 55)
    Image.fromarray(np.asarray(Image.open(deep).convert("L")) // 2 + 40).convert("P").save(deep.with_name("pear.png"))
    assert load(tree).labels.bincount().tolist() == [14, 12, 12]


def test_a_missing_folder_names_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-get install openclipart-png"):
        openclipart(tmp_path)


@pytest.mark.parametrize(
    ("stem", "name"),
    [("Pear_simple_bw-02", "pear"), ("pear01", "pear"), ("pear_half", "pear half"), ("1234", "")],
)
def test_the_name_of_a_drawing(stem, name):
    assert module._drawing_name(stem) == name
