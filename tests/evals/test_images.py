import socket

import pytest
import skimage.data
import torch

from tokenprune.evals.images import mean_by_photograph, photographs


@pytest.fixture(scope="module")
def crops():
    return photographs(56)


def test_there_are_enough_crops_of_enough_photographs(crops):
    assert crops.images.shape == (45, 3, 56, 56)
    assert crops.images.dtype == torch.uint8
    assert len(crops.names) == 45
    assert all(crops.names.count(name) == 5 for name in crops.names)


def test_no_two_crops_are_equal_and_none_is_flat(crops):
    flat = crops.images.flatten(1)
    assert len({bytes(each.numpy()) for each in flat}) == 45
    assert flat.float().std(1).min() > 10


def test_the_first_crop_is_the_central_square_and_then_come_the_corners():
    crops = photographs(512)
    place = crops.names.index("astronaut")
    astronaut = torch.from_numpy(skimage.data.astronaut().copy()).permute(2, 0, 1)
    assert torch.equal(crops.images[place], astronaut)
    # 70% of 512 is 358 pixels; a corner, shrunk again, is that part of the photograph.
    for corner, (top, left) in enumerate([(0, 0), (0, 154), (154, 0), (154, 154)], start=1):
        part = astronaut[:, top : top + 358, left : left + 358].float()
        shrunk = torch.nn.functional.interpolate(
            crops.images[place + corner][None].float(), size=(358, 358), mode="bilinear", antialias=True
        )[0]
        assert (shrunk - part).abs().mean() < 4


def test_wide_photographs_are_not_squeezed():
    crops = photographs(300)
    chelsea = torch.from_numpy(skimage.data.chelsea().copy()).permute(2, 0, 1)
    assert torch.equal(crops.images[crops.names.index("chelsea")], chelsea[:, :, 75:375])


def test_grey_photographs_are_grey_in_all_channels(crops):
    camera = crops.images[crops.names.index("camera")]
    assert torch.equal(camera[0], camera[1])
    assert torch.equal(camera[0], camera[2])


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    photographs(28)


def test_means_by_photograph():
    values = torch.tensor([1.0, 3.0, 10.0, 5.0])
    assert mean_by_photograph(values, ("b", "b", "a", "c")).tolist() == [2.0, 10.0, 5.0]
