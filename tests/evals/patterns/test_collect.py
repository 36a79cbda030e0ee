"""What is collected of each image, against the record, the host and loops."""

from types import SimpleNamespace

import pytest
import torch
import windows_zoo
from families import build, images

import tokenprune
from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.evals.arms import build_arms
from tokenprune.evals.data import open_data
from tokenprune.evals.digit_masks import DigitMasks, masked_digits
from tokenprune.evals.patterns.collect import collect_patterns, fates

PATCHES = 35


@pytest.fixture(scope="module")
def vit():
    return build("class_token")


@pytest.fixture(scope="module")
def batch(vit):
    return images(vit, 5)


def collect(model, data, methods, budgets=({"keep": 0.4},), **settings):
    source = open_data(data)
    arms = build_arms(model, next(source.batches(1))[0], methods, budgets, baselines=False)
    return collect_patterns(arms, source, **settings)


def test_fates_worked_by_hand():
    # Two images of four patches: block 0 merges 3 into 0 or drops 1; block 2 keeps one token of the first image.
    places = [
        SimpleNamespace(
            name="blocks.0",
            kept=torch.tensor([[0, 1, 2], [0, 2, 3]]),
            source=torch.tensor([[0, 1, 2, 0], [0, -1, 1, 2]]),
        ),
        SimpleNamespace(
            name="blocks.2",
            kept=torch.tensor([[1, -1], [0, 3]]),
            source=torch.tensor([[-1, 0, -1, -1], [0, -1, 0, 1]]),
        ),
    ]
    depth, groups = fates(SimpleNamespace(places=places), (1, 2, 3), 4, 2, 4)
    assert depth.tolist() == [[2, 4, 2, 0], [4, 0, 2, 4]]
    assert groups[0].tolist() == [[0, 1, 2, 0], [-1, 0, -1, -1], [-1, 0, -1, -1]]
    assert groups[1].tolist() == [[0, -1, 1, 2], [0, -1, 0, 1], [0, -1, 0, 1]]
    whole, own = fates(None, (0, 3), 4, 1, 3)
    assert whole.tolist() == [[4, 4, 4]]
    assert own.tolist() == [[[0, 1, 2], [0, 1, 2]]]


@pytest.mark.parametrize("method", ["tome", "top_k", "diffrate", "ats"])
def test_depth_and_groups_are_the_records(vit, batch, method):
    unpatched, found = collect(vit, batch, [method], batch_size=2)
    assert found.grid == (5, 7)
    assert (found.blocks, found.stages) == (4, (1, 2, 3))
    assert bool((unpatched.depth == 4).all())
    with tokenprune.patched(vit, method, keep=0.4), tokenprune.record(vit) as recording, torch.no_grad():
        vit(batch)
    places = {int(place.name.split(".")[1]): place for place in recording.forwards[0].places}
    for image in range(5):
        alive, sources = set(range(PATCHES)), list(range(PATCHES))
        for block in range(4):
            if block in places:
                kept = set(places[block].kept[image].tolist()) - {-1}
                assert kept < alive or method == "ats", "what is gone does not come back"
                assert found.depth[image, list(alive - kept)].tolist() == [block] * len(alive - kept)
                alive, sources = kept, places[block].source[image].tolist()
            if block in found.stages:
                stage = found.stages.index(block)
                assert found.kept(stage)[image].nonzero().flatten().tolist() == sorted(alive)
                assert found.groups[image, stage].tolist() == sources
        assert found.depth[image, list(alive)].tolist() == [4] * len(alive)
    assert found.merges == (method not in ("top_k", "ats"))


@pytest.mark.parametrize("family", ["class_token", "rotary_registers"])
def test_class_tokens_are_the_hosts(family):
    model = build(family)
    batch = images(model, 3)
    unpatched, dropped = collect(model, batch, ["top_k"])
    with torch.no_grad():
        expected = [
            prefix[:, 0]
            for _, prefix in model.forward_intermediates(
                batch, indices=[1, 2, 3], return_prefix_tokens=True, intermediates_only=True
            )
        ]
        with tokenprune.patched(model, "top_k", keep=0.4):
            last = model.forward_features(batch)[:, 0]
    torch.testing.assert_close(unpatched.features, torch.stack(expected, 1))
    torch.testing.assert_close(model.norm(dropped.features[:, -1]), last)
    assert not torch.allclose(dropped.features[:, 1], unpatched.features[:, 1])


def test_class_tokens_of_a_packed_batch_are_each_images_own(vit, batch):
    _, together = collect(vit, batch, ["ats"], batch_size=5)
    _, alone = collect(vit, batch, ["ats"], batch_size=1)
    torch.testing.assert_close(together.features, alone.features)
    assert together.depth.equal(alone.depth)
    assert len({int(kept.sum()) for kept in together.kept(-1)}) > 1, "the images must keep different numbers"


def test_right_answers_are_of_the_labels_or_the_unpatched_models(vit, batch):
    with torch.no_grad():
        answers = vit(batch).argmax(1)
        with tokenprune.patched(vit, "random", keep=0.2):
            changed = vit(batch).argmax(1)
    labels = answers.clone()
    labels[0] = (labels[0] + 1) % 1000
    unpatched, dropped = collect(vit, (batch, labels), ["random"], [{"keep": 0.2}], batch_size=3)
    assert unpatched.right.tolist() == [False, True, True, True, True]
    assert dropped.right.tolist() == (changed == labels).tolist()
    unpatched, dropped = collect(vit, batch, ["random"], [{"keep": 0.2}])
    assert unpatched.right.all()
    assert dropped.right.tolist() == (changed == answers).tolist()
    with pytest.raises(TokenPruneError, match="without a label"):
        collect(vit, (batch, torch.full_like(labels, -1)), ["random"])


def test_hooks_are_gone_and_samples_are_drawn(vit, batch):
    assert len(collect(vit, batch, ["tome"], samples=2)[1].depth) == 2
    assert not any(module._forward_hooks for module in vit.modules())


@pytest.mark.parametrize("family", ["map_pool", "parallel_scaling", "talking_heads"])
def test_no_class_token_among_the_blocks_tokens(family):
    model = build(family)
    assert all(pattern.features is None for pattern in collect(model, images(model, 2), ["random"]))


def test_windows_are_refused():
    model = windows_zoo.build()
    with pytest.raises(UnsupportedModel, match="windows are passed through"):
        collect(model, windows_zoo.images(), ["random"])


def test_nothing_that_runs_is_refused_with_the_reason(vit, batch):
    with pytest.raises(UnsupportedModel, match="flops"):
        collect(vit, batch, ["top_k"], [{"flops": 0.001}])


def test_a_tower_with_a_head_that_segments():
    model = DigitMasks().eval()
    data = masked_digits("test", 4)
    unpatched, found = collect(model, data, ["top_k"], ({"keep": 0.5},))
    assert found.blocks == len(model.vit.blocks)
    assert found.grid == (10, 10)
    with torch.inference_mode():
        whole = model(data[0]).argmax(1)
        tokenprune.patch(model, "top_k", keep=0.5)
        same = (model(data[0]).argmax(1) == whole).double().mean((1, 2))
    assert unpatched.right.tolist() == [1.0] * 4
    assert torch.equal(found.right, same)
    assert 0.5 < float(found.right.min()) < 1
