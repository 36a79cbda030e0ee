"""Ragged batches as data: packing, reducing and unpacking against loops over images and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenprune.ragged import Pack, RaggedReduction, keep_where, pack_batch, repack

PREFIX = 2
# What each token of four images of six becomes: kept, merged into another, or dropped (-1).
TARGETS = torch.tensor(
    [
        [0, 1, -1, 3, 1, 3],
        [-1, -1, 2, -1, -1, -1],
        [0, 1, 2, 3, 4, 5],
        [5, -1, 5, -1, -1, 5],
    ]
)


def first_pack(sizes: Tensor | None = None) -> Pack:
    return pack_batch(torch.arange(6).expand(4, -1), sizes, PREFIX)


def rows() -> Tensor:
    """[T, C] that say which image and token they are: image 10, token 1; prefix tokens are negative."""
    body = 10.0 * torch.arange(4)[:, None] + torch.arange(6)
    prefix = -1.0 - 10 * torch.arange(4)[:, None] - torch.arange(PREFIX)
    return torch.cat([prefix, body], 1).reshape(-1, 1)


def second_pack(merges: bool = False, sizes: Tensor | None = None) -> tuple[Pack, Tensor]:
    repacking = repack(first_pack(sizes), [RaggedReduction(TARGETS)], merges=merges)
    return repacking.after, repacking(rows())


def test_shorter_images_first_in_the_order_of_the_batch() -> None:
    pack, x = second_pack()
    assert pack.images == (1, 3, 0, 2)
    assert pack.lengths == (3, 3, 5, 8)
    assert pack.counts() == (3, 1, 6, 1)
    assert pack.starts.tolist() == [0, 3, 6, 11, 19]
    assert pack.first_rows.tolist() == [6, 0, 11, 3]
    assert [(group.rows.start, group.rows.stop, group.images, group.length) for group in pack.groups] == [
        (0, 6, (1, 3), 3),
        (6, 11, (0,), 5),
        (11, 19, (2,), 8),
    ]
    expected = [[-11, -12, 12], [-31, -32, 35], [-1, -2, 0, 1, 3], [-21, -22, 20, 21, 22, 23, 24, 25]]
    assert [part[:, 0].tolist() for part in x.split(pack.lengths)] == expected
    assert pack.origin.tolist() == [-1, -1, 2, -1, -1, 5, -1, -1, 0, 1, 3, -1, -1, 0, 1, 2, 3, 4, 5]


def test_padded_in_the_order_of_the_batch() -> None:
    pack, x = second_pack()
    padded = pack.padded(x, fill=99)[..., 0]
    assert padded.shape == (4, 8)
    assert padded[1].tolist() == [-11, -12, 12] + [99] * 5
    assert padded[2].tolist() == [-21, -22, 20, 21, 22, 23, 24, 25]


@pytest.mark.parametrize("weighted", [False, True])
def test_merging_is_an_average_by_size(weighted: bool) -> None:
    sizes = torch.tensor([[1.0, 2, 3, 4, 5, 6]]).repeat(4, 1) if weighted else None
    pack, x = second_pack(merges=True, sizes=sizes)
    weights = sizes[0].tolist() if sizes is not None else [1.0] * 6
    for image, part, size in zip(pack.images, x.split(pack.lengths), pack.sizes.split(pack.lengths), strict=True):
        assert size[:PREFIX].tolist() == [1, 1]
        for position, leaving in enumerate(sorted({t for t in TARGETS[image].tolist() if t >= 0})):
            group = [j for j in range(6) if TARGETS[image, j] == leaving]
            total = sum(weights[j] for j in group)
            mean = sum(weights[j] * (10 * image + j) for j in group) / total
            assert part[PREFIX + position, 0] == pytest.approx(mean)
            assert size[PREFIX + position] == total


def test_a_second_reduction_goes_on_from_the_first() -> None:
    pack, x = second_pack()
    # Groups of lengths 1, 3 and 6: images 1 and 3, image 0, image 2.
    targets = [torch.zeros(2, 1).long(), torch.tensor([[-1, 1, 2]]), torch.tensor([[-1, 1, -1, -1, 1, -1]])]
    repacking = repack(pack, [RaggedReduction(target) for target in targets], merges=False)
    assert repacking.after.images == (1, 3, 2, 0)
    assert repacking.after.counts() == (2, 1, 1, 1)
    assert repacking(x)[:, 0].tolist() == [-11, -12, 12, -31, -32, 35, -21, -22, 21, -1, -2, 1, 3]
    first = pack.first_rows[:, None] + PREFIX
    followed = repacking.follow(torch.cat([first, first + 1, torch.full_like(first, -1)], 1))
    start = repacking.after.first_rows + PREFIX
    assert followed[0].tolist() == [-1, start[0], -1]  # token 0 was dropped, token 1 is now the first
    assert followed[2].tolist() == [-1, start[2], -1]


def test_an_image_that_keeps_nothing_keeps_its_first_token() -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[2, 3:5] = True
    repacking = repack(first_pack(), [keep_where(mask)], merges=False)
    assert repacking.after.counts() == (1, 1, 2, 1)
    assert pack_bodies(repacking.after) == [[0], [0], [3, 4], [0]]


def pack_bodies(pack: Pack) -> list[list[int]]:
    return [part[PREFIX:].tolist() for part in pack.by_image(pack.origin)]


def test_a_batch_of_no_images() -> None:
    pack = pack_batch(torch.zeros(0, 6).long(), None, PREFIX)
    repacking = repack(pack, [], merges=True)
    assert repacking.after.counts() == ()
    assert repacking(torch.zeros(0, 5)).shape == (0, 5)
    assert repacking.after.padded(torch.zeros(0, 5)).shape == (0, PREFIX + 1, 5)
    assert repacking.follow(torch.zeros(0, 6).long()).shape == (0, 6)


def test_nan_stays_in_its_group() -> None:
    x = rows()
    x[8 + PREFIX + 3] = float("nan")  # a token of image 1 that is dropped
    x[3 * 8 + PREFIX] = float("nan")  # a token of image 3 that is merged into its last
    repacking = repack(first_pack(), [RaggedReduction(TARGETS)], merges=True)
    broken = repacking(x).isnan()[:, 0]
    assert broken.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_gradients(dtype: torch.dtype) -> None:
    x = rows().to(dtype).requires_grad_()
    out = repack(first_pack(), [RaggedReduction(TARGETS)], merges=True)(x)
    assert out.dtype == dtype
    out.sum().backward()
    dropped = torch.cat([torch.zeros(4, PREFIX, dtype=torch.bool), TARGETS < 0], 1).flatten()
    assert (x.grad[:, 0] == 0).tolist() == dropped.tolist()
