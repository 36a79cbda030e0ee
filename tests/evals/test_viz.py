from types import SimpleNamespace

import pytest
import timm
import torch

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.viz import contact_sheet, fit_to_grid, kept_overlay, place_panels


def patch_of(drawn, row, column, size):
    return drawn[row * size : (row + 1) * size, column * size : (column + 1) * size].float() / 255


def test_kept_dropped_and_merged_patches_look_different():
    picture = torch.rand(3, 24, 36, generator=torch.Generator().manual_seed(0))
    source = torch.tensor([0, -1, 1, 1, 2, 3])
    drawn = kept_overlay(picture, source, (2, 3))
    original = picture.permute(1, 2, 0)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (24, 36, 3)
    for row, column in ((0, 0), (1, 1), (1, 2)):
        torch.testing.assert_close(
            patch_of(drawn, row, column, 12), patch_of(original * 255, row, column, 12), atol=0.5 / 255 + 1e-6, rtol=0
        )
    faded = patch_of(original * 255, 0, 1, 12) * 0.2 + 0.8
    torch.testing.assert_close(patch_of(drawn, 0, 1, 12), faded, atol=0.5 / 255 + 1e-6, rtol=0)


def test_a_group_has_one_colour_of_outline_around_it_and_none_inside():
    source = torch.tensor([0, 0, 1, 2])
    drawn = kept_overlay(torch.full((3, 48, 48), 0.5), source, (2, 2)).float()
    line, edge = 24 // 12, drawn[0, 0]
    assert not torch.equal(edge, drawn[12, 12])
    assert (drawn[:line, :48] == edge).all(), "along the top of both patches"
    assert (drawn[24 - line : 24, :48] == edge).all(), "along the bottom of both"
    assert (drawn[:24, :line] == edge).all()
    assert (drawn[:24, 48 - line :] == edge).all()
    assert (drawn[line : 24 - line, line : 48 - line] == drawn[12, 12]).all(), "no line between the two"
    assert (drawn[24:] == drawn[30, 30]).all(), "patches that stand for themselves have no outline"


def test_two_groups_have_two_colours():
    drawn = kept_overlay(torch.zeros(3, 24, 48), torch.tensor([5, 5, 9, 9]), (1, 4))
    assert not torch.equal(drawn[0, 0], drawn[0, 47])


def test_a_picture_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(ValueError, match="grid"):
        kept_overlay(torch.zeros(3, 25, 24), torch.zeros(4, dtype=torch.long), (2, 2))
    with pytest.raises(ValueError, match="grid"):
        kept_overlay(torch.zeros(3, 24, 24), torch.zeros(5, dtype=torch.long), (2, 2))


@pytest.mark.parametrize("grid", [(5, 5), (7, 3), (3, 8)])
def test_fit_to_grid_has_whole_patches(grid):
    fitted = fit_to_grid(torch.rand(3, 70, 64), grid)
    assert fitted.shape[1] % grid[0] == 0
    assert fitted.shape[2] % grid[1] == 0
    assert fitted.shape[1] >= 192
    assert fitted.shape[2] / fitted.shape[1] == pytest.approx(64 / 70, rel=0.05)


def test_panels_of_chosen_places(monkeypatch):
    grid = (2, 2)
    sources = [torch.tensor([[0, 1, 2, -1]]), torch.tensor([[0, 0, 1, -1]]), torch.tensor([[0, 0, -1, -1]])]
    places = [SimpleNamespace(name=f"blocks.{i}", source=source, grid=None) for i, source in enumerate(sources)]

    class FakeRecord:
        def __enter__(self):
            return SimpleNamespace(forwards=[SimpleNamespace(grid=grid, places=places)])

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(tokenprune, "record", lambda _model: FakeRecord(), raising=False)
    picture = torch.full((3, 8, 8), 0.5)
    panels = place_panels(torch.nn.Identity(), torch.zeros(1, 3, 8, 8), picture, "title")
    assert [caption for caption, _ in panels] == ["title", "blocks.0: 4 -> 3", "blocks.1: 4 -> 2", "blocks.2: 4 -> 1"]
    assert len({panel.shape for _, panel in panels}) == 1
    assert (panels[0][1] == 128).all()
    chosen = place_panels(torch.nn.Identity(), torch.zeros(1, 3, 8, 8), picture, "title", places=2)
    assert [caption.split(":")[0] for caption, _ in chosen] == ["title", "blocks.0", "blocks.2"]


def test_a_patch_that_acts_in_training_alone_has_nothing_to_draw():
    model = timm.create_model("test_vit", img_size=32).eval()
    tokenprune.patch(model, "flip", keep=0.5)
    with pytest.raises(TokenPruneError, match="nothing to draw"):
        place_panels(model, torch.zeros(1, 3, 32, 32), torch.zeros(3, 32, 32), "flip")


def test_sheet_holds_every_panel_at_its_place():
    red = ("red", torch.tensor([255, 0, 0], dtype=torch.uint8).expand(20, 30, 3).contiguous())
    blue = ("blue", torch.tensor([0, 0, 255], dtype=torch.uint8).expand(20, 10, 3).contiguous())
    sheet = contact_sheet([[red, blue], [blue]])
    pixels = [sheet.getpixel((x, y)) for x in range(sheet.width) for y in range(sheet.height)]
    assert pixels.count((255, 0, 0)) == 600
    assert pixels.count((0, 0, 255)) == 400
    assert sheet.getpixel((6 + 1, 6 + 16 + 1)) == (255, 0, 0)
