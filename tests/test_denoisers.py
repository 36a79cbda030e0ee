"""diffusers' denoisers, one tiny random model of each supported class."""

import copy
import pickle
from pathlib import Path

import diffusers
import pytest
import torch
from denoisers_zoo import ZOO, build, gradients, run, traces

import tokenprune
from tokenprune import registry
from tokenprune.denoisers.patch import DenoiserPatch
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.schedule import Stages

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=sorted(ZOO))
def denoiser(request):
    model, inputs = build(request.param)
    return request.param, model, inputs


def stacks(model, method="random"):
    """Names of the stacks, as the error names them."""
    with pytest.raises(tokenprune.BudgetError) as told:
        tokenprune.patch(model, method, schedule={"no such stack": 0.5})
    return str(told.value).split("the model has ")[1].split(", ")


def shuffled(scores, record, keep):
    n = record.tokens
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return Reduction(order.expand(record.origin.shape[0], -1))


@pytest.fixture
def shuffle():
    registry.register_method("shuffle")(lambda: Method("shuffle", "test", Stages(0.5), shuffled))
    yield "shuffle"
    registry._METHODS.pop("shuffle")


def test_a_full_budget_and_a_selection_of_all_tokens_change_no_bit(denoiser):
    _, model, inputs = denoiser
    x = inputs(3, 16, 12)
    plain, before = run(model, x), traces(model)
    tokenprune.patch(model, "at_edm", keep=1.0)
    assert torch.equal(run(model, x), plain)
    for method in ("random", "at_edm"):
        tokenprune.patch(model, method, schedule=dict.fromkeys(stacks(model), 1.0))
        assert torch.equal(run(model, x), plain)
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)
    assert traces(model) == before


def test_tokens_in_another_order_give_the_same(denoiser, shuffle):
    # All that is indexed by token is followed: a rotary row, mask or embedding that is not would give another output.
    _, model, inputs = denoiser
    x = inputs(2, 16, 12)
    plain = run(model, x)
    tokenprune.patch(model, shuffle, schedule=dict.fromkeys(stacks(model), 1.0))
    out = run(model, x)
    tokenprune.unpatch(model)
    torch.testing.assert_close(out, plain, rtol=0, atol=2e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("size", [(2, 16, 16), (3, 16, 12)])
def test_a_flops_budget_is_met_at_any_size_and_batch(denoiser, size):
    name, model, inputs = denoiser
    x = inputs(*size)
    plain = run(model, x)
    tokenprune.patch(model, "random", flops=0.6, steps={})
    out = run(model, x)
    report = tokenprune.report(model).to_dict()
    tokenprune.unpatch(model)
    assert out.shape == plain.shape
    assert torch.isfinite(out).all()
    assert not torch.equal(out, plain)
    assert report["flops_ratio"] == pytest.approx(0.6, abs=0.02), name
    assert all(place["tokens_out"] < place["tokens_in"] for place in report["places"])


@pytest.mark.parametrize("denoiser", ["flux", "unet_sd"], indirect=True)
def test_costs_are_counted_once_for_an_image_size_and_are_those_of_any_batch(denoiser, monkeypatch):
    _, model, inputs = denoiser
    counted = []
    count = DenoiserPatch._count
    monkeypatch.setattr(DenoiserPatch, "_count", lambda *arguments: counted.append(1) or count(*arguments))

    def report_of(*sizes):
        tokenprune.patch(model, "random", flops=0.6, steps={})
        for size in sizes:
            before = len(counted)
            run(model, inputs(*size))
        report = tokenprune.report(model).to_dict()
        tokenprune.unpatch(model)
        return report, len(counted) - before

    alone, again = report_of((1, 16, 12), (3, 16, 12))
    assert again == 0
    assert report_of((1, 16, 16), (3, 16, 12))[0] == alone


def test_every_supported_class_is_here():
    """The number of classes is pinned, so that one that is dropped is noticed."""
    print(f"{len(ZOO)} denoisers: {', '.join(ZOO)}")
    pinned = (Path(__file__).parent / "denoiser_classes.txt").read_text().split()
    assert sorted(ZOO) == pinned


def test_positional_and_keyword_calls_are_the_same():
    model, inputs = build("unet_sdxl")
    x = inputs(2, 16, 12)
    tokenprune.patch(model, "random", keep=0.5)
    by_name = run(model, x)
    with torch.no_grad():
        by_place = model(
            x["sample"], x["timestep"], x["encoder_hidden_states"], added_cond_kwargs=x["added_cond_kwargs"]
        ).sample
    assert torch.equal(by_name, by_place)


def test_a_patched_model_pickles_and_copies():
    model, inputs = build("dit")
    x = inputs(2, 16, 16)
    tokenprune.patch(model, "at_edm", keep=0.5)
    patched = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, x), patched)
        tokenprune.unpatch(twin)
        assert not torch.equal(run(twin, x), patched)
    assert torch.equal(run(model, x), patched)


def test_unknown_transformers_are_refused_with_the_reason():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    with pytest.raises(tokenprune.UnsupportedModel, match="convolution over the full grid"):
        tokenprune.patch(model, "random", keep=0.5)


def test_both_halves_of_a_guided_batch_compute_the_same_tokens():
    model, inputs = build("unet_sdxl")
    x = inputs(2, 16, 12)
    x["sample"] = x["sample"][:1].repeat(2, 1, 1, 1)
    tokenprune.patch(model, "at_edm", keep=0.3, steps={})
    kept = []
    block = model.mid_block.attentions[0].transformer_blocks[1]
    block.attn1.register_forward_pre_hook(lambda _, args: kept.append(args[0].shape[1]))
    seen = {}
    from tokenprune.denoisers import run as runs

    run(model, x)
    for name, chosen in next(reversed(runs._THREAD.runs.values())).sets.items():
        seen[name] = chosen.reduction.kept
    assert seen
    assert kept == [4]  # 12 tokens, 30%
    assert all(torch.equal(kept[0], kept[1]) for kept in seen.values())


def test_a_second_call_of_the_same_step_takes_the_same_tokens():
    model, inputs = build("flux")
    x = inputs(1, 16, 12)
    other = {**x, "pooled_projections": -3 * x["pooled_projections"]}
    tokenprune.patch(model, "at_edm", keep=0.3, steps={})
    alone = run(model, other)
    x["hidden_states"] = x["hidden_states"].clone()  # other latents are another run
    first = run(model, x)
    second = run(model, {**other, "hidden_states": x["hidden_states"]})
    assert not torch.equal(first, alone)
    assert not torch.equal(second, alone)  # with the first call's tokens
    assert torch.equal(run(model, {**other, "hidden_states": x["hidden_states"].clone()}), alone)


def test_steps_follow_the_timestep_whatever_came_before():
    model, inputs = build("unet_sdxl")
    x = inputs(2, 16, 12)
    tokenprune.patch(model, "random", keep=0.5, steps={(0.0, 0.5): 0.0})
    early, late = ({**x, "timestep": torch.tensor(t)} for t in (900, 100))
    patched = {t["timestep"].item(): run(model, t) for t in (early, late, early, late)}
    tokenprune.unpatch(model)
    assert torch.equal(patched[900], run(model, early))
    assert not torch.equal(patched[100], run(model, late))


@pytest.mark.parametrize("first", ["patch", "cache"])
def test_first_block_cache_sees_the_patched_model_in_either_order(first):
    model, inputs = build("flux")
    x = inputs(1, 16, 12)
    cache = lambda: model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-9))  # noqa: E731
    tokenprune.patch(model, "random", keep=0.4)
    alone = run(model, x)
    tokenprune.unpatch(model)
    plain = run(model, x)
    steps = [cache, lambda: tokenprune.patch(model, "random", keep=0.4)]
    for step in steps if first == "cache" else reversed(steps):
        step()
    with model.cache_context("cond"):
        assert torch.equal(run(model, x), alone)
    tokenprune.unpatch(model)
    with model.cache_context("other"):
        assert torch.equal(run(model, x), plain)
    model.disable_cache()
    assert torch.equal(run(model, x), plain)


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_offloaded_blocks_are_patched_in_either_order(first):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, inputs = build("pixart")
    x = inputs(2, 16, 12)
    plain = run(model, x)
    tokenprune.patch(model, "random", keep=0.4)
    alone = run(model, x)
    tokenprune.unpatch(model)
    steps = [
        lambda: [add_hook_to_module(block, ModelHook()) for block in model.transformer_blocks],
        lambda: tokenprune.patch(model, "random", keep=0.4),
    ]
    for step in steps if first == "offload" else reversed(steps):
        step()
    assert torch.equal(run(model, x), alone)
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)
    for block in model.transformer_blocks:
        remove_hook_from_module(block)
    assert torch.equal(run(model, x), plain)
    assert all(type(block).__name__ == type(block).__qualname__ for block in model.transformer_blocks)


def test_a_replaced_forward_that_is_not_known_is_refused():
    model, _ = build("dit")
    block = model.transformer_blocks[0]
    block.forward = lambda *args, **kwargs: None
    with pytest.raises(tokenprune.UnsupportedModel, match="patch the model first"):
        tokenprune.patch(model, "random", keep=0.5)
    del block.forward


def test_a_budget_below_the_floor_names_it():
    model, inputs = build("dit")
    tokenprune.patch(model, "random", flops=0.05)
    with pytest.raises(tokenprune.BudgetError, match=r"use flops=0\.\d+ or more"):
        run(model, inputs(1, 16, 16))


def test_gradients_and_checkpointing_agree():
    model, inputs = build("dit")
    x = inputs(2, 16, 16)
    tokenprune.patch(model, "at_edm", keep=0.5)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        grads.append(gradients(model, [x])[0])
    assert torch.equal(*grads)


def test_a_pipeline_is_patched_through_its_denoiser_and_unpatched():
    torch.manual_seed(0)
    model, _ = build("unet_sd")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    pipe = diffusers.StableDiffusionPipeline(
        vae, None, None, model, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 8)

    def sample():
        generator = torch.Generator().manual_seed(0)
        arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "num_inference_steps": 4}
        return pipe(**arguments, height=64, width=48, generator=generator, output_type="latent").images

    plain = sample()
    assert tokenprune.patch(pipe, "at_edm", flops=0.9, similar_by="hidden") is pipe
    patched = sample()
    assert not torch.equal(patched, plain)
    assert torch.equal(sample(), patched)  # nothing is left of the run before
    report = tokenprune.report(pipe).to_dict()
    assert report["flops_ratio"] == pytest.approx(0.9, abs=0.02)
    assert {place["steps"] for place in report["places"]} == {
        "0% to 30% of the run",
        "30% to 100% of the run",
        "every step",
    }
    tokenprune.unpatch(pipe)
    assert torch.equal(sample(), plain)
