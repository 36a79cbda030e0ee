"""Visual tokens left out behind the tower: generation is that of a loop written by hand, in every family."""

from __future__ import annotations

import pytest
import torch
from lvlm_zoo import build, by_hand, close, evenly_gone, generate, language_model, left_padded, most_in_full, prompt
from torch import Tensor, nn

import tokenprune

ATTENTION = ["sdpa", pytest.param("eager", marks=pytest.mark.full)]


def same(mine: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(mine[0], other[0])
    assert torch.equal(mine[1], other[1])


def hooks(model: nn.Module) -> int:
    tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", most_in_full("llava", "qwen3_vl", "gemma3"))
def test_keeping_everything_is_bit_identical(name: str, attention: str) -> None:
    model, example = build(name, attention), prompt(name)
    before = generate(model, example.inputs)
    plain = model(**example.inputs)
    every = {"tokens": len(example.images[0])}
    for budget in (
        {"keep": 1.0},
        every,
        {**every, "positions": "reindex"} if name in ("llava", "paligemma") else every,
    ):
        with tokenprune.patched(model, "uniform", **budget):
            same(generate(model, example.inputs), before)
            assert torch.equal(model(**example.inputs).logits, plain.logits)
    batch = left_padded([example.inputs, prompt(name, 1, text=7).inputs])
    whole = generate(model, batch)
    with tokenprune.patched(model, "uniform", **every):
        same(generate(model, batch), whole)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", most_in_full("llava", "llava_next", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma"))
def test_a_quarter_is_the_loop_by_hand(name: str, attention: str) -> None:
    model, example = build(name, attention), prompt(name)
    expected = by_hand(model, example.inputs, evenly_gone(example, 0.25))
    with tokenprune.patched(model, "uniform", keep=0.25):
        cached = generate(model, example.inputs)
        close(cached, expected)
        close(generate(model, example.inputs, use_cache=False), expected)
        # the loop must be able to tell: without pruning the scores are far away
    assert (generate(model, example.inputs)[1] - expected[1]).abs().max() > 1e-3 * expected[1].abs().max()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", most_in_full("llava", "qwen2_vl", "gemma3", "internvl"))
def test_a_left_padded_batch_equals_singles(name: str, attention: str) -> None:
    """Samples with more or other images and other texts keep different numbers of tokens."""
    model = build(name, attention)
    more = 2 if name not in ("idefics3", "smolvlm") else 1  # of a batch, these take the same number of images each
    examples = [prompt(name, 0).inputs, prompt(name, 1, text=9, images=more, size=1).inputs]
    with tokenprune.patched(model, "uniform", keep=0.25):
        singles = [generate(model, one) for one in examples]
        together = generate(model, left_padded(examples))
    for row, single in enumerate(singles):
        close((together[0][row : row + 1], together[1][:, row : row + 1]), single)


@pytest.mark.parametrize("name", most_in_full("llava", "onevision"))
def test_unpatch_leaves_nothing(name: str) -> None:
    model, example = build(name), prompt(name)
    before, state, classes = (
        generate(model, example.inputs),
        dict(vars(model.model)),
        [type(m) for m in model.modules()],
    )
    count = hooks(model)
    tokenprune.patch(model, "top_k", keep=0.5)
    generate(model, example.inputs)
    assert hooks(model) > count
    tokenprune.unpatch(model)
    assert hooks(model) == count
    assert [type(m) for m in model.modules()] == classes
    assert vars(model.model).keys() == state.keys()
    same(generate(model, example.inputs), before)


@pytest.mark.parametrize("name", most_in_full("qwen2_vl"))
def test_several_images_and_none(name: str) -> None:
    model = build(name)
    two = prompt(name, images=2 if name not in ("idefics3", "smolvlm") else 1)
    expected = by_hand(model, two.inputs, evenly_gone(two, 0.5))
    without = prompt(name, images=0, text=6).inputs
    plain = generate(model, without)
    with tokenprune.patched(model, "uniform", keep=0.5):
        close(generate(model, two.inputs), expected)
        same(generate(model, without), plain)
        if name not in ("idefics3", "smolvlm", "paligemma"):  # a batch may hold a prompt without an image
            mixed = left_padded([two.inputs, {**two.inputs, **without}])
            pixels = {k: v for k, v in two.inputs.items() if k not in without}
            together = generate(model, {**{k: v for k, v in mixed.items() if k in without}, **pixels})
            close((together[0][:1], together[1][:, :1]), expected)
            close((together[0][1:], together[1][:, 1:]), plain)


@pytest.mark.parametrize("name", most_in_full("qwen3_vl"))
def test_beams_and_sampling(name: str) -> None:
    model, example = build(name), prompt(name)
    gone = evenly_gone(example, 0.25)
    batch = left_padded([example.inputs, prompt(name, 1, text=6).inputs])
    with tokenprune.patched(model, "uniform", keep=0.25):
        beams = generate(model, batch, num_beams=3)
        for row, one in enumerate([example.inputs, prompt(name, 1, text=6).inputs]):
            assert torch.equal(generate(model, one, num_beams=3)[0][0], beams[0][row])
        uncached = generate(model, batch, num_beams=3, use_cache=False)
        assert torch.equal(beams[0], uncached[0])
        torch.manual_seed(3)
        sampled = generate(model, example.inputs, do_sample=True, top_k=5, num_return_sequences=2)
        torch.manual_seed(3)
        again = generate(model, example.inputs, do_sample=True, top_k=5, num_return_sequences=2, use_cache=False)
        assert torch.equal(sampled[0], again[0])
    first = by_hand(model, example.inputs, gone, tokens=1)[1]
    assert (sampled[1][0][:1] - first[0])[sampled[1][0][:1] != 0].abs().max() <= 2e-6 * first.abs().max()


@pytest.mark.parametrize("name", most_in_full("llava", "qwen2_vl"))
def test_positions_counted_anew(name: str) -> None:
    """`positions="reindex"` is the prompt without its tokens: positions counted through, and on from there."""
    model, example = build(name), prompt(name)
    gone = evenly_gone(example, 0.25)
    text, calls = language_model(model), []
    with tokenprune.patched(model, "uniform", keep=0.25, positions="reindex"):
        hook = text.rotary_emb.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(args[1] if len(args) > 1 else kwargs["position_ids"]), with_kwargs=True
        )
        cached = generate(model, example.inputs)
        hook.remove()
        close(cached, generate(model, example.inputs, use_cache=False))
    first = 1 if name == "paligemma" else 0
    kept = example.inputs["input_ids"].shape[1] - len(gone)
    prefill, *decoded = [p for p in calls if p.shape[-1] > 1][:1] + [p for p in calls if p.shape[-1] == 1]
    assert torch.equal(prefill.reshape(-1, kept)[-1], torch.arange(first, first + kept))
    steps = list(dict.fromkeys(int(p.flatten()[-1]) for p in decoded))
    assert steps == [first + kept, first + kept + 1, first + kept + 2]
    with tokenprune.patched(model, "uniform", keep=0.25):
        assert (generate(model, example.inputs)[1] - cached[1]).abs().max() > 1e-3 * cached[1].abs().max()


@pytest.mark.parametrize(
    "name", most_in_full("qwen2_vl", names=("llava", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma"))
)
def test_positions_counted_anew_in_a_batch(name: str) -> None:
    model = build(name)
    examples = [prompt(name, 0).inputs, prompt(name, 1, text=9, images=2, size=1).inputs]
    with tokenprune.patched(model, "uniform", keep=0.25, positions="reindex"):
        singles = [generate(model, one) for one in examples]
        together = generate(model, left_padded(examples))
    for row, single in enumerate(singles):
        close((together[0][row : row + 1], together[1][:, row : row + 1]), single)


@pytest.mark.parametrize("name", most_in_full("llava", names=("llava", "qwen3_vl", "gemma3", "internvl")))
def test_bfloat16(name: str) -> None:
    model, example = build(name).to(torch.bfloat16), prompt(name)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in example.inputs.items()}
    whole = generate(model, inputs)
    with tokenprune.patched(model, "uniform", tokens=len(example.images[0])):
        same(generate(model, inputs), whole)
    between = [] if name == "gemma3" else [("feather", {"places": (2, 3), "rate": 0.6})]
    for method, options in [("visionzip", {"keep": 0.5}), ("zero_tprune", {"keep": 0.5}), *between]:
        with tokenprune.patched(model, method, **options):
            scores = generate(model, inputs)[1]
        assert scores.isfinite().all()
        assert not torch.equal(scores, whole[1])
