import json
from importlib import resources

import numpy as np
import torch

from tokenprune.evals import train_masks
from tokenprune.evals.digit_masks import (
    CHECKPOINT,
    CLASSES,
    MaskHead,
    mask_head,
    masked_digits,
    overlaps,
    patch_features,
)
from tokenprune.evals.digits import PIXEL_MEAN, PIXEL_STD, cluttered_digits
from tokenprune.evals.digits_vit import digits_vit
from tokenprune.evals.segmentation import mean_iou

CHECKPOINTS = resources.files("tokenprune.evals") / "checkpoints"


def test_masks_lie_on_the_digit_to_be_read():
    """Bright cells of one class, that of the label; the same pictures as those of the classification."""
    images, masks = masked_digits("test", 40, seed=9)
    plain, labels = cluttered_digits("test", 40, seed=9)
    assert torch.equal(images, plain)
    bright = (images * PIXEL_STD + PIXEL_MEAN).mean(1).view(40, 20, 4, 20, 4).mean((2, 4))
    for image, mask, label, light in zip(images, masks, labels, bright, strict=True):
        assert image.shape == (3, 80, 80)
        assert set(mask.unique().tolist()) == {0, int(label) + 1}
        rows, columns = np.nonzero(mask.numpy())
        assert max(np.ptp(rows), np.ptp(columns)) < 7
        assert light[mask > 0].mean() > 1.4 * light[mask == 0].mean()


def test_the_shipped_head_segments_fresh_test_canvases():
    record = json.loads((CHECKPOINTS / "digit_masks.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(train_masks.RECIPE))
    images, masks = masked_digits("test", 100, seed=train_masks.SEED + 5)
    with torch.inference_mode():
        logits = mask_head()(patch_features(digits_vit(), images))
    assert logits.shape == (100, CLASSES, 20, 20)
    assert abs(mean_iou(overlaps(logits.argmax(1), masks)).item() - record["test_mean_iou"]) < 0.08
    assert record["test_mean_iou"] > 0.6
    assert len((CHECKPOINTS / CHECKPOINT).read_bytes()) <= 300_000


def test_training_writes_a_head_that_loads_and_a_record(tmp_path, capsys, monkeypatch):
    for name, count in (("CANVASES", 70), ("TEST_IMAGES", 10)):
        monkeypatch.setattr(train_masks, name, count)
    record = train_masks.train(tmp_path, 2)
    assert "step 2/2" in capsys.readouterr().out
    assert json.loads((tmp_path / "digit_masks.json").read_text()) == json.loads(json.dumps(record))
    from safetensors.torch import load_file

    MaskHead().load_state_dict(load_file(tmp_path / CHECKPOINT))
