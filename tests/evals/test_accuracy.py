from functools import partial

import pytest
import timm
import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals import bench, evaluate
from tokenprune.evals.arms import Arm, build_arms
from tokenprune.evals.bench import time_arm, timing_cells
from tokenprune.evals.data import ImageData, open_data
from tokenprune.evals.fidelity import agreement, correct, observe
from tokenprune.evals.stats import Interval
from tokenprune.evals.throughput import Timing, measure
from tokenprune.registry import make_method


def strong_vit(num_classes=10, depth=4):
    """A random ViT whose tokens matter: at timm's initial scale every method would give the same answer."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=depth, img_size=96, num_classes=num_classes, global_pool="avg", class_token=False
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def vit():
    return strong_vit()


@pytest.fixture(scope="module")
def labelled(vit):
    images = torch.randn(48, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = vit(images).argmax(1)
    labels[::4] = (labels[::4] + 1) % 10
    return images, labels


def rows_by_method(table):
    return {row["method"]: row for row in table.rows}


def test_unpatched_row_is_the_plain_accuracy_and_rows_agree_with_a_loop(vit, labelled):
    import copy

    import tokenprune

    images, labels = labelled
    table = evaluate(vit, labelled, ["top_k"], [{"keep": 0.4}], batch_size=20)
    rows = rows_by_method(table)
    assert list(rows) == ["unpatched", "top_k", "random", "uniform", "smaller input"]
    assert rows["unpatched"]["top1"] == pytest.approx(0.75)
    assert rows["unpatched"]["agreement"] == 1.0
    assert rows["unpatched"]["cosine"] == pytest.approx(1.0)

    patched = tokenprune.patch(copy.deepcopy(vit), "top_k", keep=0.4)
    with torch.no_grad():
        logits, reference = patched(images), vit(images)
    row = rows["top_k"]
    assert row["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert row["agreement"] == pytest.approx(float((logits.argmax(1) == reference.argmax(1)).double().mean()))
    assert row["agreement"] < 1.0, "the budget must change some answer for this test to mean anything"
    assert row["top1_drop"] == pytest.approx(0.75 - row["top1"])
    assert row["top1_kept"] == pytest.approx(row["top1"] / 0.75)
    assert row["flops_ratio"] == pytest.approx(tokenprune.report(patched).to_dict()["flops_ratio"])
    assert row["tokens"] == tokenprune.report(patched).to_dict()["places"][-1]["tokens_out"]
    assert row["top1_low"] <= row["top1"] <= row["top1_high"]
    assert 0 < row["cosine"] < 1


def test_model_and_global_rng_are_left_alone(vit, labelled):
    images, _ = labelled
    with torch.no_grad():
        before = vit(images[:4])
    vit.train()
    state = torch.get_rng_state()
    evaluate(vit, labelled, ["random"], [{"keep": 0.5}], samples=10)
    bench(vit, images[:1], ["random"], [{"keep": 0.5}], baselines=False)
    assert torch.equal(state, torch.get_rng_state())
    assert vit.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())
    vit.eval()
    with torch.no_grad():
        assert torch.equal(before, vit(images[:4]))


def test_a_model_without_classifier_is_judged_by_neighbours(labelled):
    model = strong_vit(num_classes=0)
    rows = rows_by_method(evaluate(model, labelled, ["top_k"], [{"keep": 0.4}], baselines=False))
    assert "top1" not in rows["unpatched"]
    assert "agreement" not in rows["unpatched"]
    assert 0.0 <= rows["top_k"]["knn"] <= 1.0
    assert rows["top_k"]["knn_drop"] == pytest.approx(rows["unpatched"]["knn"] - rows["top_k"]["knn"])
    assert rows["top_k"]["knn_kept"] == pytest.approx(rows["top_k"]["knn"] / rows["unpatched"]["knn"])


def test_too_few_images_to_have_neighbours_are_told(labelled):
    backbone, (images, labels) = strong_vit(num_classes=0), labelled
    with pytest.raises(TokenPruneError, match="1 of tensors are too few to have neighbours"):
        evaluate(backbone, (images, labels), ["top_k"], samples=1, seed=3)  # by which it is the one to be classified


def test_saliency_and_groups(vit):
    images = torch.randn(12, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    data = open_data(images)
    grouped = ImageData("crops", data.items, data.size, None, groups=torch.arange(12) // 4)

    def tokens_map(model, inputs):
        return model.forward_features(inputs).norm(dim=-1).view(len(inputs), 1, inputs.shape[-2] // 16, -1)

    settings = {"methods": ["top_k"], "budgets": [{"keep": 0.5}], "saliency": tokens_map}
    single, by_group = (rows_by_method(evaluate(vit, source, **settings)) for source in (images, grouped))
    assert single["unpatched"]["saliency"] == pytest.approx(1.0)
    assert -1 < single["smaller input"]["saliency"] < 1
    assert by_group["top_k"]["cosine"] == pytest.approx(single["top_k"]["cosine"])
    assert evaluate(vit, grouped, **settings).environment["independent groups"] == 3
    assert by_group["top_k"]["cosine_low"] != single["top_k"]["cosine_low"]


def test_an_impossible_budget_is_a_row_with_its_reason(vit, labelled):
    table = evaluate(vit, labelled, ["top_k"], [{"flops": 0.001}, {"keep": 0.5}], samples=4)
    refused = [row for row in table.rows if row["budget"] == "flops=0.001"]
    assert refused
    assert all(row["note"] for row in refused if row["method"] != "smaller input")
    assert all("top1" not in row for row in refused if row["method"] == "top_k")
    assert "top1" in next(row for row in table.rows if row["budget"] == "keep=0.5")


def test_a_named_method_that_is_unknown_raises(vit, labelled):
    with pytest.raises(TokenPruneError, match="no_such_method"):
        evaluate(vit, labelled, ["no_such_method"], [{"keep": 0.5}])


def test_hidden_labels_are_refused(vit, labelled):
    images, labels = labelled
    with pytest.raises(TokenPruneError, match="without a label"):
        evaluate(vit, (images, torch.full_like(labels, -1)), ["top_k"], [{"keep": 0.5}])


def test_smaller_input_matches_the_flops(vit, labelled):
    arms = build_arms(vit, labelled[0][:2], ["top_k"], [{"flops": 0.7}, {"keep": 0.5}])
    by_flops, by_keep = (arm for arm in arms if arm.method == "smaller input")
    assert by_flops.size == (80, 80)
    assert by_flops.flops_ratio == pytest.approx(0.7, abs=0.06)
    ratios = sorted(arm.flops_ratio for arm in arms if arm.budget == "keep=0.5" and arm.is_patched)
    assert abs(by_keep.flops_ratio - ratios[1]) < 0.15


def test_every_fitting_method_is_taken_where_none_is_named(vit, labelled):
    import tokenprune

    arms = build_arms(vit, labelled[0][:2], None, [{"keep": 0.5}])
    named = [arm.method for arm in arms if arm.is_patched]
    trained = {info.name for info in tokenprune.methods(vit) if make_method(info.name, {}).learned is not None}
    fitting = {info.name for info in tokenprune.methods(vit) if not info.training_only} - trained
    assert sorted(named) == sorted(fitting | {"random", "uniform"})
    assert {"flip", "noise_mask"}.isdisjoint(fitting)
    with pytest.raises(tokenprune.UnsupportedMethod, match="training alone"):
        build_arms(vit, labelled[0][:2], ["flip"], [{"keep": 0.5}])
    with pytest.raises(tokenprune.UnsupportedMethod, match="training alone"):
        tokenprune.search(vit, labelled[0][:2], "flip", flops=0.6)


def test_bench_has_every_row_and_its_conditions(vit, labelled, monkeypatch):
    monkeypatch.setitem(bench.__globals__, "measure", partial(measure, sample_seconds=0))
    table = bench(vit, labelled[0][:2], ["top_k"], [{"keep": 0.25}], batch_sizes=[1, 3], rounds=20)
    methods = ("unpatched", "top_k", "random", "uniform", "smaller input")
    assert [(row["batch"], row["method"]) for row in table.rows] == [(n, method) for n in (1, 3) for method in methods]
    for row in table.rows:
        assert row["images_per_s"] > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["promised"] == pytest.approx(1 / row["flops_ratio"])
        assert row["peak_mb"] is None, "not measured on a CPU"
    assert table.rows[0]["flops_ratio"] == 1.0
    assert table.environment["threads"] == torch.get_num_threads()


def test_the_patched_model_is_timed_against_the_unpatched_one(monkeypatch):
    class Named(torch.nn.Module):
        def __init__(self, name, log):
            super().__init__()
            self.name, self.log = name, log

        def __deepcopy__(self, memo):
            return Named(f"copy of {self.name}", self.log)

        def forward(self, images):
            self.log.append((self.name, tuple(images.shape[-2:])))

    log = []

    def call_each(reference, candidate, control, **_options):
        reference(), candidate(), control()

    monkeypatch.setitem(time_arm.__globals__, "measure", call_each)
    base, small = Arm("unpatched", "", Named("base", log)), Arm("tome", "", Named("patched", log), size=(8, 8))
    time_arm(small, base, torch.zeros(1, 3, 16, 16))
    assert log == [("base", (16, 16)), ("patched", (8, 8)), ("copy of base", (16, 16))]


def test_a_timing_becomes_images_per_second_and_megabytes():
    timing = Timing(20, 1, 0.5, 0.25, Interval(2.0, 1.9, 2.1), 1.01, True, 1, 4 * 2**20, 2**20)
    assert timing_cells(timing, 8) == {
        "images_per_s": 32.0,
        "unpatched_images_per_s": 16.0,
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
        "control": 1.01,
        "trusted": True,
        "peak_mb": 1.0,
        "unpatched_peak_mb": 4.0,
    }


def test_reported_flops_are_the_counted_ones(vit, labelled):
    base, patched = build_arms(vit, labelled[0][:1], ["top_k"], [{"keep": 0.5}], baselines=False)
    assert patched.flops / patched.flops_ratio == pytest.approx(base.flops, rel=1e-6)


def test_five_of_many_classes(labelled):
    images, _ = labelled
    model = strong_vit(num_classes=30, depth=2)
    with torch.no_grad():
        order = model(images).argsort(1, descending=True)
    labels = torch.stack([order[i, (0, 3, 4, 5)[i % 4]] for i in range(len(images))])
    rows = rows_by_method(evaluate(model, (images, labels), ["top_k"], [{"keep": 0.4}], baselines=False))
    assert rows["unpatched"]["top1"] == pytest.approx(0.25)
    assert rows["unpatched"]["top5"] == pytest.approx(0.75)
    assert rows["top_k"]["top1"] <= rows["top_k"]["top5"] < 0.75
    assert "top5" not in rows_by_method(evaluate(strong_vit(), labelled, [], [{"keep": 0.4}]))["unpatched"]


def test_observe_catches_what_enters_the_classifier(vit, labelled):
    images, _ = labelled
    with torch.no_grad():
        seen = observe(vit, images[:5])
        expected = vit.forward_head(vit.forward_features(images[:5]), pre_logits=True)
    torch.testing.assert_close(seen.features, expected)
    assert seen.logits.shape == (5, 10)
    assert not vit.head._forward_pre_hooks
    features_only = observe(torch.nn.Flatten(), images[:5])
    assert features_only.features is features_only.logits
    assert correct(torch.eye(3), torch.tensor([0, 1, 0])).tolist() == [True, True, False]
    assert agreement(torch.eye(3), torch.eye(3)[[0, 2, 2]]).tolist() == [True, False, True]


def test_images_that_give_nan_are_told(vit, labelled):
    images, labels = labelled
    broken = images.clone()
    broken[3] = torch.nan
    rows = rows_by_method(evaluate(vit, (broken, labels), ["random"], [{"keep": 0.5}], baselines=False))
    assert rows["random"]["note"] == "NaN on 1 of 48 images"
    assert rows_by_method(evaluate(vit, labelled, ["random"], [{"keep": 0.5}], samples=8))["random"]["note"] is None
