import math
from dataclasses import replace

import pytest
import torch

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals import digits_denoisers, generation, generation_arms, generation_bench
from tokenprune.evals.digits_pipelines import digits_pipeline, pipeline_of
from tokenprune.evals.drawing_orders import drawing_orders
from tokenprune.evals.drawn_digits import drawn_digit_pictures
from tokenprune.evals.frechet import gaussian
from tokenprune.evals.stats import Interval
from tokenprune.evals.throughput import Timing

STEPS = 4


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _dit():
    torch.manual_seed(0)
    model = digits_denoisers.dit(num_layers=2, num_attention_heads=1)
    for parameter in model.parameters():  # its last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def _unet():
    torch.manual_seed(0)
    return digits_denoisers.unet(block_out_channels=(8, 16), attention_head_dim=1)


@pytest.fixture(params=[_dit, _unet], ids=["dit", "unet"])
def pipe(request):
    return pipeline_of(request.param())


def _arms(pipe, steps=STEPS, guidance=1.0):
    return generation_arms.generation_arms(
        pipe, drawing_orders(1, 0), [], [], steps=steps, guidance=guidance, baselines=False
    )


def test_the_first_steps_alone_are_the_full_runs_and_then_one_leap(pipe):
    orders, (base,) = drawing_orders(3, 0), _arms(pipe)
    short = generation_arms.first_steps(base, 3)
    assert (short.steps, short.flops_ratio) == (3, 3 / STEPS)
    x, predict = orders.noise, digits_denoisers.predict
    with torch.no_grad():
        for sigma, length in ((1.0, 0.25), (0.75, 0.25), (0.5, 0.5)):
            t = torch.full((len(x),), 1000 * sigma)
            x = x - length * predict(base.model, x, t, orders.labels, orders.centres)
    torch.testing.assert_close(short.draw(orders), (x * 0.16 + 0.25).clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(short.draw(orders), generation_arms.fewer_steps(base, 3, "").draw(orders), atol=1e-3)


def test_orders_depend_on_seed_and_number_alone():
    few, many = drawing_orders(5, 3), drawing_orders(40, 3)
    assert all(torch.equal(a, b) for a, b in zip(few, many.first(5), strict=True))
    assert not torch.equal(few.noise, drawing_orders(5, 4).noise)
    assert len({tuple(noise.flatten()[:4].tolist()) for noise in many.noise}) == 40
    assert many.labels.tolist() == list(range(10)) * 4
    assert drawing_orders(90, 0).centres.unique(dim=0).tolist() == [[r, c] for r in (6, 18, 30) for c in (6, 18, 30)]
    parts = list(many.batches(16))
    assert [len(part.labels) for part in parts] == [16, 16, 8]
    assert torch.equal(torch.cat([part.noise for part in parts]), many.noise)


def test_the_pipeline_is_eulers_method_on_the_velocity(pipe):
    orders = drawing_orders(3, 0)
    run = {"num_inference_steps": STEPS, "guidance_scale": 1.0}
    drawn = pipe(orders.labels, centres=orders.centres, latents=orders.noise, **run)
    x = orders.noise
    with torch.no_grad():
        for step in range(STEPS):
            t = torch.full((3,), 1000.0 * (1 - step / STEPS))
            x = x - digits_denoisers.predict(pipe.denoiser, x, t, orders.labels, orders.centres) / STEPS
    torch.testing.assert_close(drawn, (x * 0.16 + 0.25).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_guidance_goes_beyond_the_label(pipe):
    orders = drawing_orders(2, 0)
    guided = pipe(orders.labels, num_inference_steps=1, guidance_scale=3.0, latents=orders.noise)
    with torch.no_grad():
        t = torch.full((2,), 1000.0)
        free = digits_denoisers.predict(
            pipe.denoiser, orders.noise, t, torch.full((2,), digits_denoisers.UNCONDITIONAL)
        )
        bound = digits_denoisers.predict(pipe.denoiser, orders.noise, t, orders.labels)
    expected = orders.noise - (free + 3 * (bound - free))
    torch.testing.assert_close(guided, (expected * 0.16 + 0.25).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_pictures_do_not_depend_on_their_batch(pipe):
    arm, orders = _arms(pipe)[0], drawing_orders(5, 0)
    whole, parts = (torch.cat(generation.draw(arm, list(orders.batches(size)))) for size in (5, 2))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


def test_flops_are_of_the_whole_run_and_of_both_branches(pipe):
    one, many, guided = _arms(pipe, 1)[0], _arms(pipe, 5)[0], _arms(pipe, 5, guidance=2.0)[0]
    assert many.flops == 5 * one.flops
    assert guided.flops == 2 * many.flops
    fewer = generation_arms.fewer_steps(many, 3, "x")
    assert (fewer.flops, fewer.flops_ratio, fewer.steps) == (3 * one.flops, 0.6, 3)


def test_psnr_and_its_ceiling():
    reference = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.8
    pictures = reference.clone()
    pictures[1] += 0.1
    pictures[2, 0, 0, 0] += 0.1
    found = generation.psnr(pictures, reference)
    assert found[1].item() == pytest.approx(20, abs=1e-3)
    assert found[2].item() == pytest.approx(20 + 10 * math.log10(48), abs=1e-3)
    assert found[0].item() == pytest.approx(10 * math.log10(12 * 255**2), abs=1e-3)


def test_scores_of_the_same_pictures_and_of_spoilt_ones(pipe):
    arm = _arms(pipe)[0]
    labels = drawing_orders(20, 0).labels
    real = generation.real_features(200)
    pictures = torch.from_numpy(drawn_digit_pictures("test", 20, seed=1)[0]).permute(0, 3, 1, 2) / 255
    spoilt = pictures.clone()
    spoilt[:10] = 0
    arms = [arm, generation_arms.fewer_steps(arm, 2, "same"), generation_arms.fewer_steps(arm, 1, "spoilt")]
    base, same, worse = generation.score_drawings(arms, [pictures, pictures, spoilt], labels, real)
    assert "frechet_rise" not in base
    assert same["frechet_rise"] == same["frechet_rise_low"] == same["frechet_rise_high"] == 0
    assert same["cosine"] == pytest.approx(1)
    assert worse["frechet_rise_low"] > 0
    assert worse["psnr"] < same["psnr"]
    assert base["frechet_low"] < base["frechet"] < base["frechet_high"]
    with pytest.raises(TokenPruneError, match="at least two"):
        generation.score_drawings([arm], [pictures[:1]], labels[:1], real)


def test_unipc_is_nearer_to_many_small_steps_than_as_many_of_eulers():
    orders, (base,) = drawing_orders(3, 0), _arms(digits_pipeline("dit-digits"), 60)
    fine, euler = base.draw(orders), generation_arms.fewer_steps(base, 6, "").draw(orders)
    arm = generation_arms.unipc_steps(base, 6, "flops=0.06")
    unipc = arm.draw(orders)
    assert torch.equal(arm.draw(orders), unipc), "a run carries what it saw over into the next"
    assert not arm.is_patched
    assert (unipc - fine).abs().mean() < (euler - fine).abs().mean()


def test_accuracy_is_the_share_that_the_reader_takes_for_the_label(pipe):
    pictures, labels, _ = drawn_digit_pictures("test", 200)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    real = gaussian(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)))
    right = generation.score_drawings(_arms(pipe), [images], torch.from_numpy(labels), real)[0]
    wrong = generation.score_drawings(_arms(pipe), [images], (torch.from_numpy(labels) + 1) % 10, real)[0]
    assert right["accuracy"] > 0.9
    assert wrong["accuracy"] < 0.1


def test_equal_time_takes_the_steps_that_the_patched_run_leaves_time_for(pipe):
    base = _arms(pipe, 20)[0]

    patched = [
        replace(base, method="at_edm", budget="flops=0.6"),
        replace(base, method="tomesd", budget="flops=0.6"),
        replace(base, method="slow", budget="flops=0.6"),
    ]
    fewer = generation_arms.fewer_steps(base, 12, "flops=0.6")
    arms = [base, *patched, fewer]
    extra = generation_arms.equal_time(arms, [Interval(s, s, s) for s in (1.0, 1.25, 20 / 12, 0.9, 1.6)])
    assert [(arm.steps, arm.budget) for arm in extra] == [(16, "flops=0.6")]


def test_evaluation_draws_scores_and_times(pipe, monkeypatch):
    monkeypatch.setattr(generation, "REAL_IMAGES", 100)
    monkeypatch.setattr(
        generation_bench,
        "measure",
        lambda a, b, c, **_: (
            [run() for run in (a, b, c)] and Timing(20, 1, 1.0, 0.5, Interval(2.0, 1.9, 2.1), 1.0, True, 1, None, None)
        ),
    )
    before = [parameter.clone() for parameter in pipe.denoiser.parameters()]
    table = generation.evaluate_generation(pipe, [], [{"flops": 0.5}], samples=6, steps=STEPS, rounds=20)
    rows = {row["method"]: row for row in table.rows}
    assert {"unpatched", "fewer steps", "random", "uniform"} == set(rows)
    assert rows["fewer steps"]["steps"] == 2
    assert rows["fewer steps"]["speedup"] == 2.0
    assert rows["fewer steps"]["psnr"] < 58
    assert table.environment["images"] == 6
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.denoiser.parameters(), strict=True))
    for row in table.rows:
        assert ("frechet" in row) or row["note"]


def test_an_unknown_method_is_refused(pipe):
    with pytest.raises(TokenPruneError):
        generation.evaluate_generation(pipe, ["no_such_method"], samples=4, steps=2)


def test_timing_rows(pipe):
    table = generation_bench.bench_generation(pipe, [], [], steps=1, rounds=20, baselines=False)
    (row,) = table.rows
    assert row["images_per_s"] > 0
    assert row["promised"] == 1.0
    assert row["control"] > 0
    assert tokenprune.unpatch(pipe.denoiser) is pipe.denoiser
