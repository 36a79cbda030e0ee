"""Counts of pixels against loops and torchmetrics, and the columns that `evaluate` makes of them."""

import pytest
import torch
from torchmetrics.segmentation import MeanIoU

from tokenprune.errors import TokenPruneError
from tokenprune.evals import evaluate
from tokenprune.evals.digit_masks import DigitMasks, masked_digits
from tokenprune.evals.segmentation import bootstrap_iou, mean_iou, overlaps


def test_overlaps_and_mean_iou_of_loops():
    generator = torch.Generator().manual_seed(0)
    predicted, truth = (torch.randint(3, (4, 5, 6), generator=generator) for _ in range(2))
    counts = overlaps(predicted, truth, classes=4)
    ious = []
    for kind in range(3):
        cells = [(int(p), int(t)) for p, t in zip(predicted.flatten(), truth.flatten(), strict=True)]
        both = sum(p == t == kind for p, t in cells)
        ious.append(both / sum(kind in cell for cell in cells))
    assert mean_iou(counts).item() == pytest.approx(sum(ious) / 3)  # the fourth class is nowhere
    drawn = counts[torch.tensor([[0, 0, 2, 3], [1, 1, 1, 1]])]
    assert mean_iou(drawn).tolist() == pytest.approx([mean_iou(each).item() for each in drawn])


def test_mean_iou_is_that_of_torchmetrics():
    """Which, too, adds up the pixels of all images first, where it is told to."""
    generator = torch.Generator().manual_seed(1)
    predicted, truth = (torch.randint(5, (6, 9, 7), generator=generator) for _ in range(2))
    theirs = MeanIoU(num_classes=5, per_class=True, input_format="index")
    theirs.update(predicted.flatten()[None], truth.flatten()[None])
    assert mean_iou(overlaps(predicted, truth, 5)).item() == pytest.approx(theirs.compute().mean().item(), abs=1e-6)


def test_pixels_without_a_label_do_not_count():
    generator = torch.Generator().manual_seed(2)
    predicted, truth = (torch.randint(4, (3, 8, 8), generator=generator) for _ in range(2))
    hidden = truth.clone()
    hidden[:, :4], hidden[:, 0, 0] = 255, -1
    expected = overlaps(predicted[:, 4:], truth[:, 4:], 4)
    assert torch.equal(overlaps(predicted, hidden, 4), expected)
    with pytest.raises(TokenPruneError, match="class 4, and the model tells 4 apart"):
        overlaps(predicted, truth + 1, 4)


def test_the_interval_is_over_images_and_paired():
    generator = torch.Generator().manual_seed(3)
    counts = overlaps(*(torch.randint(3, (20, 6, 6), generator=generator) for _ in range(2)), 3)
    found, draws = bootstrap_iou(counts)
    assert found.estimate == draws[0].item() == mean_iou(counts).item()
    assert found.low < found.estimate < found.high
    grouped, _ = bootstrap_iou(counts.repeat_interleave(2, 0), groups=torch.arange(20).repeat_interleave(2))
    assert grouped.low == pytest.approx(found.low)
    assert torch.equal(bootstrap_iou(counts + 1)[1] > 0, draws > 0)


def test_maps_are_evaluated_as_in_a_loop():
    import copy

    import tokenprune

    model, (images, masks) = DigitMasks().eval(), masked_digits("test", 12, seed=4)
    masks[0, :9] = 255
    table = evaluate(model, (images, masks), ["top_k"], [{"flops": 0.6}], batch_size=5, baselines=False)
    rows = {row["method"]: row for row in table.rows}
    patched = tokenprune.patch(copy.deepcopy(model), "top_k", flops=0.6, prefix_only_last=False)
    with torch.no_grad():
        maps = {"unpatched": model(images).argmax(1), "top_k": patched(images).argmax(1)}
    for name, found in maps.items():
        assert rows[name]["miou"] == pytest.approx(mean_iou(overlaps(found, masks, 11)).item())
        assert rows[name]["agreement"] == pytest.approx((found == maps["unpatched"]).double().mean().item())
    assert rows["top_k"]["miou_drop"] == pytest.approx(rows["unpatched"]["miou"] - rows["top_k"]["miou"])
    assert rows["top_k"]["miou_kept"] == pytest.approx(rows["top_k"]["miou"] / rows["unpatched"]["miou"])
    assert rows["unpatched"]["miou_drop"] is None
    assert "top1" not in rows["top_k"]
