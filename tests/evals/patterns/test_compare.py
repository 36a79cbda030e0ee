"""Pairs, tables, intervals and correlations of a comparison; the command and what it refuses."""

import itertools
import math

import pytest
import scipy.stats
import torch
from families import build, images

from tokenprune import cli
from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.evals.patterns import compare
from tokenprune.evals.patterns.comparison import Subject
from tokenprune.evals.patterns.pairs import measure_pairs, pair_up
from tokenprune.evals.patterns.pattern import Pattern
from tokenprune.evals.patterns.tables import correlation_rows, pair_rows
from tokenprune.evals.stats import bootstrap_mean, percentile_ends, resample_weights
from tokenprune.evals.table import Table

IMAGES = 24
METHODS = ["top_k", "tome", "evit", "random"]


def made(method, budget="a", model="", seed=0, right=0.5):
    """A pattern of random depths on a grid of 2 x 3, of 4 blocks; all patches to the end where it is unpatched."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.randint(5, (IMAGES, 6), generator=generator, dtype=torch.int16)
    return Pattern(
        model, method, "" if method == "unpatched" else budget, 0.5, (2, 3), 4, (1, 2, 3),
        torch.full_like(depth, 4) if method == "unpatched" else depth,
        torch.randint(3, (IMAGES, 3, 6), generator=generator, dtype=torch.int16),
        torch.randn(IMAGES, 3, 4, generator=generator),
        torch.rand(IMAGES, generator=generator) < right,
    )  # fmt: skip


@pytest.fixture(scope="module")
def several():
    names = ["unpatched", "tome", "top_k", "evit", "pitome", "random"]
    patterns = [made(name, seed=number, right=0.9 - number / 8) for number, name in enumerate(names)]
    pairs = pair_up(patterns, ["top_k"])
    weights = resample_weights(IMAGES, resamples=30)
    measure_pairs(pairs, weights, ["kept", "clusters", "depth", "features"])
    return patterns, pairs, weights


def test_who_is_compared_with_whom():
    small, large = made("tome", "a", seed=1), made("tome", "b", seed=1)
    small.depth.clamp_(max=2)
    patterns = [
        made("unpatched"),
        small,
        made("top_k", "a"),
        large,
        made("top_k", "b", "other"),
        made("tome", "a", "other"),
    ]
    found = [
        (p.first.model, p.first.label, p.second.model, p.second.label, p.across) for p in pair_up(patterns, ["top_k"])
    ]
    assert sorted(found) == sorted([
        ("", "unpatched", "", "tome, a", "unpatched"),
        ("", "unpatched", "", "tome, b", "unpatched"),
        ("", "unpatched", "", "top_k, a", "unpatched"),
        ("", "top_k, a", "", "tome, a", "methods"),
        ("", "tome, b", "", "tome, a", "budgets"),
        ("", "tome, a", "other", "tome, a", "models"),
    ])  # fmt: skip


def test_tables_are_means_over_images_with_their_intervals(several):
    _, pairs, _ = several
    pair = next(pair for pair in pairs if (pair.first.method, pair.second.method) == ("top_k", "evit"))
    row = next(row for row in pair_rows([pair], "kept") if row["block"] == "2")
    overlaps = []
    for first, second in zip(pair.first.depth.tolist(), pair.second.depth.tolist(), strict=True):
        kept = [{place for place, depth in enumerate(own) if depth > 2} for own in (first, second)]
        overlaps.append(len(kept[0] & kept[1]) / len(kept[0] | kept[1]) if kept[0] | kept[1] else 1.0)
    expected = bootstrap_mean(overlaps, resamples=30)
    found = (row["iou"], row["iou_low"], row["iou_high"])
    assert found == pytest.approx((expected.estimate, expected.low, expected.high))
    assert [row["first"] for row in pair_rows([pair], "depth")] == ["top_k, a"]
    assert len(pair_rows([pair], "clusters")) == len(pair_rows([pair], "features")) == 3


def test_intervals_hold_the_estimate_and_only_drops_have_no_clusters(several):
    patterns, pairs, weights = several
    for kind in ("kept", "clusters", "depth", "features"):
        for row in pair_rows(pairs, kind):
            for name in [name for name in row if f"{name}_low" in row]:
                assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    drops = made("top_k", seed=7)
    drops.groups.copy_(torch.arange(6))
    pairs = pair_up([drops, patterns[1]], [])
    measure_pairs(pairs, weights, ["kept", "clusters"])
    assert [(set(pair.kept), pair.clusters, pair.depth) for pair in pairs] == [({"iou", "ioa"}, {}, {})]


def test_weights_count_draws_of_whole_groups():
    groups = torch.tensor([0, 0, 1, 2, 2, 2])
    weights = resample_weights(6, groups=groups, resamples=200)
    assert weights[0].tolist() == [1] * 6
    assert weights[1:, [0, 2, 3]].sum(1).tolist() == [3] * 200
    assert bool((weights[:, 0] == weights[:, 1]).all())
    values = torch.tensor([1.0, 0, 3, 2, 2, 9]).double()
    expected = bootstrap_mean(values, groups=groups, resamples=200)
    low, high = percentile_ends(weights @ values / weights.sum(1))
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high))
    low, high = percentile_ends(torch.tensor([0.0, 5, 6, 7]), centred=True, level=0.5)
    assert (float(low), float(high)) == (-0.5, 0.5)


def accuracy(pattern):
    """In images, as equal differences of shares are not equal to the last bit."""
    return sum(pattern.right.tolist())


def test_correlations_equal_scipys_over_the_pairs(several):
    patterns, pairs, weights = several
    rows = {
        (row["against"], row["measure"], row.get("block")): row for row in correlation_rows(pairs, ["top_k"], weights)
    }
    top_k = next(pattern for pattern in patterns if pattern.method == "top_k")
    others = [pattern for pattern in patterns[1:] if pattern is not top_k]

    def overlap(first, second, block):
        values = []
        for one, other in zip(first.depth > block, second.depth > block, strict=True):
            union = int((one | other).sum())
            values.append(int((one & other).sum()) / union if union else 1.0)
        return round(sum(values) / IMAGES, 12)

    for block in (1, 2, 3):
        pooled = list(itertools.combinations(patterns[1:], 2))
        for against, chosen, loss in (
            ("top_k", [(top_k, other) for other in others], lambda one, other: accuracy(one) - accuracy(other)),
            ("every pair", pooled, lambda one, other: abs(accuracy(one) - accuracy(other))),
        ):
            row = rows[against, "iou", str(block)]
            values = [overlap(one, other, block) for one, other in chosen], [loss(*pair) for pair in chosen]
            assert row["pairs"] == len(chosen)
            assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(*values).statistic)
            assert row["pearson"] == pytest.approx(scipy.stats.pearsonr(*values).statistic)
            assert row["kendall"] == pytest.approx(scipy.stats.kendalltau(*values).statistic)
            assert row["spearman_low"] <= row["spearman_high"]
    lost = [accuracy(patterns[0]) - accuracy(pattern) for pattern in patterns[1:]]
    alike = [float(pair.features["cka"][0, 0]) for pair in pairs if pair.across == "unpatched"]
    order = [pair.second.method for pair in pairs if pair.across == "unpatched"]
    lost = [lost[[pattern.method for pattern in patterns[1:]].index(method)] for method in order]
    assert rows["unpatched", "cka", "1"]["spearman"] == pytest.approx(scipy.stats.spearmanr(alike, lost).statistic)
    assert ("unpatched", "iou", "1") not in rows


def test_the_loss_of_a_second_anchor_is_its_own_minus_the_others(several):
    patterns, _, weights = several
    pairs = pair_up(patterns, ["top_k", "random"])
    measure_pairs(pairs, weights[:1], ["depth"])
    rows = {(row["against"], row["measure"]): row for row in correlation_rows(pairs, ["top_k", "random"], weights[:1])}
    last = next(pattern for pattern in patterns if pattern.method == "random")
    having = [pair for pair in pairs if last in (pair.first, pair.second) and pair.across == "methods"]
    others = [pair.first if pair.second is last else pair.second for pair in having]
    expected = scipy.stats.spearmanr(
        [float(pair.depth["emd"][0]) for pair in having], [accuracy(last) - accuracy(other) for other in others]
    )
    assert rows["random", "emd"]["spearman"] == pytest.approx(expected.statistic)


def test_a_model_is_like_itself():
    model = build("class_token")
    batch = images(model, 6)
    found = compare(
        model,
        batch,
        ["tome", "top_k"],
        [{"keep": 0.4}],
        others=[Subject("again", model, batch)],
        name="it",
        resamples=10,
    )
    rows = [row for kind in ("kept", "clusters", "depth", "features") for row in found.tables[kind].rows]
    same = [row for row in rows if row["across"] == "models"]
    assert {row["first"] for row in same} == {"it: tome, keep=0.4", "it: top_k, keep=0.4", "it: unpatched"}
    for row in same:
        for name in ("iou", "ioa", "homogeneity", "completeness", "v_measure", "scc", "sim", "cka", "procrustes"):
            assert row.get(name, 1.0) == pytest.approx(1.0)
        for name in ("kl", "js", "emd"):
            assert row.get(name, 0.0) == pytest.approx(0.0, abs=1e-12)
    environment = found.tables["methods"].environment
    assert environment["it: pwcca"] == "none, 6 images are too few for 96 channels"
    assert environment["images"] == 6


def test_without_class_token_features_are_refused_or_left_out_with_the_reason():
    model = build("map_pool")
    batch = images(model, 4)
    with pytest.raises(UnsupportedModel, match="no class token"):
        compare(model, batch, ["random"], [{"keep": 0.4}], measures=["features"], resamples=5)
    found = compare(model, batch, ["random", "uniform"], [{"keep": 0.4}], resamples=5)
    assert set(found.tables) == {"methods", "kept", "depth"}
    assert "no class token" in found.tables["methods"].environment["class features"]


def test_other_grids_and_unknown_measures_are_refused():
    model, wide = build("class_token"), build("naflex")
    batch = images(model, 2)
    with pytest.raises(TokenPruneError, match="5 x 7 patches and other one of 5 x 6"):
        compare(model, batch, ["random"], [{"keep": 0.4}], others=[Subject("other", wide, batch[..., :24])], name="one")
    with pytest.raises(TokenPruneError, match="2 images"):
        compare(model, batch, ["random"], [{"keep": 0.4}], others=[Subject("other", model, batch[:1])])
    with pytest.raises(TokenPruneError, match="names of their own"):
        compare(model, batch, others=[Subject("", model, batch)])
    with pytest.raises(TokenPruneError, match="none of the methods that ran: unpatched, random"):
        compare(model, batch, ["random"], [{"keep": 0.4}], anchors=["top_k"])
    with pytest.raises(TokenPruneError, match="kept, clusters, depth, features"):
        compare(model, batch, measures=["colour"])


def test_the_command_writes_tables_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patterned_vit.py").write_text(
        "import timm, torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return timm.create_model('vit_tiny_patch16_224', img_size=64, depth=4, num_classes=3, embed_dim=48)\n"
    )
    from PIL import Image

    for name, number in itertools.product("abc", range(4)):
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        colour = (number * 60, 200 if name == "a" else 10, 90)
        Image.radial_gradient("L").convert("RGB").point(lambda x, c=colour: (x * c[0]) % 255).save(
            tmp_path / "pictures" / name / f"{number}.png"
        )
    arguments = ["patterns", "--model", "patterned_vit:build", "--data", "pictures", "--quiet", "--output", "found"]
    methods = [part for name in METHODS for part in ("--method", name)]
    assert cli.main([*arguments, *methods, "--keep", "0.3", "--resamples", "20"]) == 0
    shown = capsys.readouterr().out
    for name in ("methods", "kept", "clusters", "depth", "features", "correlation"):
        for suffix in (".md", ".csv", ".json"):
            assert (tmp_path / "found" / f"{name}{suffix}").stat().st_size > 100
        assert name in shown
    rows = Table.from_json((tmp_path / "found" / "methods.json").read_text()).rows
    assert [row["method"] for row in rows] == ["unpatched", *METHODS]
    assert [row["kept"] for row in rows] == pytest.approx([1.0, *[5 / 16] * 4])
    for name in ("kept-keep-0.3", "clusters-keep-0.3", "depth", "survival", "features", "correlation"):
        with Image.open(tmp_path / "found" / f"{name}.png") as plot:
            assert len(plot.getcolors(maxcolors=2**20)) > 20
    assert cli.main([*arguments[:2], "dit-digits", "--output", "found"]) == 1
    assert "is not for dit-digits, which draws pictures" in capsys.readouterr().err


def test_an_infinite_divergence_is_null_in_json(several):
    gone = made("evit", seed=3)
    gone.depth[:, 0] = 0
    pairs = pair_up([made("tome", seed=1), gone], [])
    measure_pairs(pairs, resample_weights(IMAGES, resamples=5), ["depth"])
    [row] = pair_rows(pairs, "depth")
    assert row["kl"] == math.inf
    assert '"kl": null' in Table([row]).to_json()
