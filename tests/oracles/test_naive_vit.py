"""The naive forward against the models themselves, where both can be computed."""

import functools
import math

import naive_vit
import pytest
import tiny_models
import torch
from naive_methods import evit, tome, top_k, uniform
from naive_zero_tprune import zero_tprune

PLACES = {2: naive_vit.leaving_share(0.7), 6: naive_vit.leaving_share(0.75), 10: naive_vit.leaving_share(0.6)}


@pytest.fixture(scope="module", params=list(tiny_models.VARIANTS))
def variant(request):
    return request.param


@pytest.mark.parametrize("reduce", [uniform, top_k, evit, tome, zero_tprune])
def test_keeping_all_is_the_plain_model(variant, reduce):
    model, x = tiny_models.build(variant), tiny_models.images()
    outcome = naive_vit.run(model, x, reduce, {3: naive_vit.leaving_share(1.0)}, proportional=True, weighted_pool=True)
    with torch.no_grad():
        expected = model.double()(x.double())
    torch.testing.assert_close(outcome.logits, expected, rtol=1e-9, atol=1e-9)
    assert all(passages[3].kept == list(range(tiny_models.PATCHES)) for passages in outcome.passages)


def test_attention_is_far_from_uniform(variant):
    """A typical query gives its favourite key at least three times its share, and heads differ in variance."""
    peaks = []

    def watch(place):
        rows = [row for head in place.attention for row in head]
        peaks.append(sum(max(row) * len(row) for row in rows) / len(rows))
        return top_k(place)

    naive_vit.run(tiny_models.build(variant), tiny_models.images(), watch, PLACES)
    assert min(peaks) > 3 * 0.6, peaks
    assert sum(peaks) / len(peaks) > 3, peaks


@pytest.mark.parametrize("name", ["class_token", "registers", "mean_pool", "mean_pool_registers"])
def test_dropping_behind_a_block_is_indexing_between_blocks(name):
    model, x = tiny_models.build(name).double(), tiny_models.images().double()
    outcome = naive_vit.run(model, x, uniform, {4: naive_vit.leaving_share(0.5)}, after_block=True)
    prefix = model.num_prefix_tokens
    rows = list(range(prefix)) + [prefix + patch for patch in outcome.passages[0][4].kept]
    with torch.no_grad():
        h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks[:5]:
            h = block(h)
        h = h[:, rows]
        for block in model.blocks[5:]:
            h = block(h)
        expected = model.forward_head(model.norm(h))
    torch.testing.assert_close(outcome.logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["class_token", "mean_pool"])
def test_merging_twins_with_proportional_attention_changes_nothing(name):
    """Tokens that are equal in pairs stay equal for good; one of weight two is then the same as both."""
    model, x = tiny_models.build_with_twins(name)
    schedule = {2: naive_vit.leaving_less(tiny_models.PATCHES // 2)}
    outcome = naive_vit.run(model, x, tome, schedule, proportional=True, weighted_pool=True)
    with torch.no_grad():
        expected = model.double()(x.double())
    assert all(p[2].source[0:34:2] == p[2].source[1:34:2] for p in outcome.passages)
    torch.testing.assert_close(outcome.logits, expected, rtol=1e-9, atol=1e-9)
    unweighted = naive_vit.run(model, x, tome, schedule)
    assert (unweighted.logits - expected).abs().max() > 1e-3


def test_choices_change_the_outcome(variant):
    """What the comparison with the package can tell apart: each choice moves the logits or the kept tokens."""
    model, x = tiny_models.build(variant), tiny_models.images()
    run = functools.partial(naive_vit.run, model, x, schedule=PLACES)

    def run_zero_tprune(similarity=4, **options):
        return run(functools.partial(zero_tprune, similarity=similarity, **options), after_block=True)

    outcomes = {
        "uniform": run(uniform),
        "top_k": run(top_k),
        "tome": run(tome),
        "tome after the block": run(tome, after_block=True),
        "tome, proportional": run(tome, proportional=True, weighted_pool=True),
        "zero_tprune": run_zero_tprune(),
        "zero_tprune, one round": run_zero_tprune(iterations=1),
        "zero_tprune, no similarity": run_zero_tprune(similarity=0),
        "zero_tprune, similarity alone": run_zero_tprune(similarity=10),
        "zero_tprune, no filter": run_zero_tprune(variance=(0.0, math.inf)),
    }
    if model.global_pool == "avg":
        outcomes["tome, plain mean"] = run(tome, proportional=True)
    if getattr(model, "cls_token", None) is not None:
        outcomes["zero_tprune, uniform start"] = run_zero_tprune(uniform_start=True)
    if variant != "rotary":
        outcomes["evit"] = run(evit)
    names = list(outcomes)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            difference = (outcomes[first].logits - outcomes[second].logits).abs().max().item()
            assert difference > 1e-3, f"{first} and {second} differ by {difference}"


@pytest.mark.parametrize("reduce", [uniform, top_k, zero_tprune])
def test_a_drop_is_the_same_before_and_after_the_mlp(variant, reduce):
    """The MLP sees one token at a time, so a drop decided by the block's attention may as well spare it that work."""
    model, x = tiny_models.build(variant), tiny_models.images()
    before = naive_vit.run(model, x, reduce, PLACES)
    after = naive_vit.run(model, x, reduce, PLACES, after_block=True)
    assert before.passages == after.passages
    torch.testing.assert_close(before.logits, after.logits)
