"""Inpainting with `region`: what is around the mask stays, what is measured is what it is called."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenprune.evals import digits_denoisers, inpainting, region_quality
from tokenprune.evals.digits_pipelines import pipeline_of
from tokenprune.evals.inpainting import Way


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    model = digits_denoisers.dit(num_layers=2, num_attention_heads=1)
    for parameter in model.parameters():  # its last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return pipeline_of(model)


@pytest.fixture(scope="module")
def given():
    return inpainting.originals(12)


@pytest.mark.parametrize("way", [Way("full", 4), Way("region", 4, dense=(0, 2))], ids=lambda way: way.name)
@pytest.mark.parametrize("side", inpainting.MASKS.values())
def test_what_is_around_the_mask_is_the_original_bit_for_bit(pipe, given, way, side):
    batch = inpainting.batches(given)[0]
    pictures, _ = inpainting.inpaint(pipe, way, batch, side)
    original = (batch.images * 0.16 + 0.25).clamp(0, 1)
    around = inpainting.mask_at(batch.places[0], side) == 0
    assert torch.equal(pictures[..., around], original[..., around])
    assert (pictures[..., ~around] - original[..., ~around]).abs().mean() > 0.01


def test_each_step_sees_the_original_with_its_share_of_noise(pipe, given):
    batch = inpainting.batches(given)[0]
    mask, steps = inpainting.mask_at(batch.places[0], 12), 3
    drawn = pipe(
        batch.labels, num_inference_steps=steps, guidance_scale=1.0, latents=batch.noise, original=batch.images,
        mask=mask,
    )  # fmt: skip
    x = batch.noise
    with torch.no_grad():
        for step in range(steps):
            sigma = 1 - step / steps
            t = torch.full((len(x),), 1000 * sigma)
            x = x - digits_denoisers.predict(pipe.denoiser, x, t, batch.labels) / steps
            later = sigma - 1 / steps
            x = torch.where(mask == 1, x, batch.images * (1 - later) + batch.noise * later)
    torch.testing.assert_close(drawn, (x * 0.16 + 0.25).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_the_mask_of_a_digit_holds_it_and_lies_on_tokens(given):
    for image, place in zip(given.images, given.places, strict=True):
        mask = inpainting.mask_at(place, inpainting.MASKS["digit"])
        rows, columns = mask.amax(1).nonzero().flatten(), mask.amax(0).nonzero().flatten()
        assert len(rows) == len(columns) == 22
        assert rows[0] % 2 == columns[0] % 2 == 0
        bright = image.amax(0) > image.amax() - 1.0  # the strokes
        assert (bright & (mask == 0)).sum() <= 2


def test_batches_are_of_one_place_and_leave_none_out(given):
    parts = inpainting.batches(given)
    assert all((part.places == part.places[0]).all() and len(part.labels) <= inpainting.BATCH for part in parts)
    assert torch.equal(torch.cat([part.noise for part in parts]), given.noise)
    assert torch.equal(torch.cat([part.images for part in parts]), given.images)


def test_the_band_is_what_is_near_the_edge():
    mask = torch.zeros(12, 12)
    mask[0:5, 4:10] = 1
    band = region_quality.edge_band(mask)
    for row, column in itertools.product(range(12), range(12)):
        others = [
            (y, x)
            for y, x in itertools.product(range(row - 2, row + 3), range(column - 2, column + 3))
            if 0 <= y < 12 and 0 <= x < 12 and mask[y, x] != mask[row, column]
        ]
        assert band[row, column] == bool(others)


def test_only_what_is_under_the_mask_counts(given):
    real = inpainting.originals(60, series=9)
    pictures = (given.images * 0.16 + 0.25).clamp(0, 1)
    spoilt = pictures.clone()
    for picture, place in zip(spoilt, given.places, strict=True):
        picture[:, inpainting.mask_at(place, 12) > 0] = 0.5
    base, same, worse = region_quality.quality_rows(
        {"full": pictures * 0.9, "same": pictures * 0.9, "worse": spoilt}, given, real, 12
    )
    assert "frechet_ratio" not in base
    for name in ("frechet", "accuracy", "boundary"):
        assert same[f"{name}_ratio"] == same[f"{name}_ratio_low"] == same[f"{name}_ratio_high"] == pytest.approx(1)
    assert worse["frechet_ratio_low"] > 1
    assert worse["boundary_ratio_low"] > 1
    assert worse["accuracy_ratio_high"] < 1


def test_region_costs_less(pipe, given):
    full = region_quality.flops_ratio(pipe, Way("full", 4), given, 12)
    fewer = region_quality.flops_ratio(pipe, Way("1 step", 1), given, 12)
    region = region_quality.flops_ratio(pipe, Way("region", 4, dense=(0,)), given, 12)
    assert full == pytest.approx(0.4)
    assert fewer == pytest.approx(0.1)
    assert fewer < region < 0.6 * full
