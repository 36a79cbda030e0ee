"""diffusers' caches on patched denoisers, switched on before and after: exact, or refused with the reason."""

import diffusers
import pytest
import torch
from denoisers_zoo import build, nothing_is_left, run
from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast

import tokenprune

torch.set_num_threads(1)
MASK = torch.eye(8, 6).bool()
BUDGETS = {
    "random": {"keep": 0.4},
    "at_edm": {"keep": 0.4, "steps": {}},
    "todo": {"keep": 0.4, "steps": {}},
    "tomesd": {"keep": 0.5},
    "region": {"mask": MASK},
    "ras": {},
    "toca": {},
}
BLOCK_CACHES = {
    "first_block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "mag": lambda: diffusers.MagCacheConfig(
        threshold=0.5, num_inference_steps=4, retention_ratio=0.3, mag_ratios=torch.ones(4)
    ),
    "taylor_lite": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, use_lite_mode=True
    ),
}


def broadcast(cross=False):
    ranges = {"cross_attention_block_skip_range": 2} if cross else {"spatial_attention_block_skip_range": 2}
    return diffusers.PyramidAttentionBroadcastConfig(**ranges, current_timestep_callback=lambda: 500)


def taylor():
    return diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)


def faster():
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, tensor_format="BCHW", current_timestep_callback=lambda: 500
    )


def step(inputs, index):
    """The inputs at a step of a run, its latents a little further."""
    x = inputs(1, 16, 12)
    x["timestep"] = (0.9 - 0.2 * index) / (1.0 if x["timestep"].is_floating_point() else 1e-3) + 0 * x["timestep"]
    return {**x, "hidden_states": (1 - 0.05 * index) * x["hidden_states"]}


def sample(model, inputs, steps):
    found = []
    for index in range(steps):
        with model.cache_context("cond"):
            found.append(run(model, step(inputs, index)))
    return found


def by_hand(cache, model, inputs):
    """What a cached model of FLUX's class puts out at a skipped step, from forwards without the cache: the earlier
    residual of the blocks added to what entered them, or the forecast of the output."""
    last = 1 if cache != "taylor_lite" else 2
    seen = {}
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    handles = [
        blocks[0].register_forward_pre_hook(lambda _, __, k: seen.update(entered=k["hidden_states"]), with_kwargs=True),
        blocks[0].register_forward_hook(lambda _, __, out: seen.update(head=out[1])),
        blocks[-1].register_forward_hook(lambda _, __, out: seen.update(tail=out[1])),
    ]
    before, outputs = [], []
    for index in range(last + 1):
        outputs.append(run(model, step(inputs, index)))
        before.append(dict(seen))
    begin = "head" if cache == "first_block" else "entered"
    residual = before[0]["tail"] - before[0][begin]
    skip = model.norm_out.register_forward_pre_hook(lambda _, args: (before[1][begin] + residual, *args[1:]))
    expected = 2 * outputs[1] - outputs[0] if cache == "taylor_lite" else run(model, step(inputs, last))
    for handle in (*handles, skip):
        handle.remove()
    return expected


@pytest.mark.parametrize(
    ("cache", "method"),
    [
        ("first_block", "random"),
        ("mag", "at_edm"),
        pytest.param("first_block", "at_edm", marks=pytest.mark.full),
        pytest.param("mag", "random", marks=pytest.mark.full),
        pytest.param("taylor_lite", "random", marks=pytest.mark.full),
    ],
)
def test_caches_of_whole_blocks_are_exact_in_either_order(cache, method):
    model, inputs = build("flux")
    plain = run(model, step(inputs, 0))
    tokenprune.patch(model, method, **BUDGETS[method])
    expected = by_hand(cache, model, inputs)
    skipped = 2 if cache == "taylor_lite" else 1
    cached = sample(model, inputs, skipped + 1)
    assert not torch.allclose(cached[skipped], expected, rtol=1e-2)  # the step that would be computed is another
    tokenprune.unpatch(model)
    for order in ("patch", "cache"):
        if order == "patch":
            tokenprune.patch(model, method, **BUDGETS[method])
        model.enable_cache(BLOCK_CACHES[cache]())
        if order == "cache":
            tokenprune.patch(model, method, **BUDGETS[method])
        found = sample(model, inputs, skipped + 1)
        assert torch.equal(found[0], cached[0])
        torch.testing.assert_close(found[skipped], expected, rtol=1e-5, atol=1e-5)
        if order == "patch":
            model.disable_cache()
            tokenprune.unpatch(model)
        else:
            tokenprune.unpatch(model)
            model.disable_cache()
        assert torch.equal(run(model, step(inputs, 0)), plain)
    assert nothing_is_left(model)


@pytest.mark.parametrize(
    "config", [broadcast, *(pytest.param(one, marks=pytest.mark.full) for one in (taylor, faster))]
)
@pytest.mark.parametrize("order", ["patch", "cache"])
def test_caches_inside_of_blocks_are_refused(config, order):
    model, inputs = build("flux")
    plain = run(model, step(inputs, 0))
    for method in ("random", "at_edm"):
        if order == "patch":
            tokenprune.patch(model, method, **BUDGETS[method])
            run(model, step(inputs, 0))
            model.enable_cache(config())
            for index in (1, 0):  # in the middle of a run, and where one begins
                with pytest.raises(
                    tokenprune.UnsupportedMethod, match=r"at an earlier step, .* call disable_cache\(\)"
                ):
                    run(model, step(inputs, index))
        else:
            model.enable_cache(config())
            with pytest.raises(tokenprune.UnsupportedMethod, match=r"at an earlier step, .* call disable_cache\(\)"):
                tokenprune.patch(model, method, **BUDGETS[method])
        model.disable_cache()
        tokenprune.unpatch(model)
        assert torch.equal(run(model, step(inputs, 0)), plain)


def test_a_full_budget_refuses_no_cache():
    model, inputs = build("flux")
    tokenprune.patch(model, "random", keep=1.0)
    model.enable_cache(broadcast())
    sample(model, inputs, 2)


@pytest.mark.parametrize("order", ["patch", "cache"])
@pytest.mark.parametrize("method", ["region", pytest.param("ras", marks=pytest.mark.full)])
def test_two_that_keep_something_over_steps_are_refused(method, order):
    model, inputs = build("flux")
    for config in (BLOCK_CACHES["first_block"], broadcast):
        if order == "patch":
            tokenprune.patch(model, method, **BUDGETS[method])
        model.enable_cache(config())
        refused = (run, model, step(inputs, 0)) if order == "patch" else (tokenprune.patch, model, method)
        with pytest.raises(tokenprune.UnsupportedMethod, match=r"and so does .* call disable_cache\(\)"):
            refused[0](*refused[1:], **({} if order == "patch" else BUDGETS[method]))
        model.disable_cache()
        tokenprune.unpatch(model)


@pytest.mark.parametrize("order", ["patch", "cache"])
@pytest.mark.parametrize(
    ("method", "cross"),
    [("todo", False), *(pytest.param(method, True, marks=pytest.mark.full) for method in ("todo", "tomesd"))],
)
def test_attention_of_all_tokens_is_broadcast(method, cross, order):
    # `todo` takes keys and values from fewer tokens, and the output of the attention is that of all.
    model, inputs = build("pixart")
    plain = run(model, step(inputs, 0))
    tokenprune.patch(model, method, **BUDGETS[method])
    kept, replay = {}, {}

    def repeat(module, args, output):
        kept[module] = replay.get(module, output)
        return kept[module]

    attentions = [block.attn2 if cross else block.attn1 for block in model.transformer_blocks]
    handles = [attention.register_forward_hook(repeat) for attention in attentions]
    computed = [run(model, step(inputs, 0))]
    replay.update(kept)
    expected = [*computed, run(model, step(inputs, 1))]
    for handle in handles:
        handle.remove()
    assert not torch.allclose(run(model, step(inputs, 1)), expected[1], rtol=1e-2)
    if order == "cache":
        tokenprune.unpatch(model)
    apply_pyramid_attention_broadcast(model, broadcast(cross))
    if order == "cache":
        tokenprune.patch(model, method, **BUDGETS[method])
    for index in (0, 1):
        assert torch.equal(run(model, step(inputs, index)), expected[index])
    tokenprune.unpatch(model)
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("pyramid_attention_broadcast", recurse=True)
    assert torch.equal(run(model, step(inputs, 0)), plain)
    assert nothing_is_left(model)


@pytest.mark.parametrize("order", ["patch", "cache"])
@pytest.mark.parametrize(
    "method", ["tomesd", *(pytest.param(method, marks=pytest.mark.full) for method in ("toca", "random"))]
)
def test_attention_of_some_tokens_is_not_broadcast(method, order):
    model, inputs = build("pixart")
    if order == "patch":
        tokenprune.patch(model, method, **BUDGETS[method])
    apply_pyramid_attention_broadcast(model, broadcast())
    refused = (run, model, step(inputs, 0)) if order == "patch" else (tokenprune.patch, model, method)
    with pytest.raises(tokenprune.UnsupportedMethod, match=r"call disable_cache\(\)"):
        refused[0](*refused[1:], **({} if order == "patch" else BUDGETS[method]))


def test_a_unet_has_no_enable_cache_and_is_watched_all_the_same():
    model, _ = build("unet_sdxl")
    apply_pyramid_attention_broadcast(model, broadcast())
    with pytest.raises(tokenprune.UnsupportedMethod, match="PyramidAttentionBroadcastHook gives what a part of"):
        tokenprune.patch(model, "random", keep=0.5)
