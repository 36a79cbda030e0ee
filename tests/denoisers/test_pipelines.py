"""Whole pipelines on a patched denoiser: guidance, callbacks, control, image to image, IP-Adapter, offloading."""

import functools

import diffusers
import pytest
import torch
from denoisers_zoo import traces
from pipelines_zoo import PIPELINES, offload_in_sequence

import tokenprune

torch.set_num_threads(1)
EDM = {"method": "at_edm", "keep": 0.5, "steps": {}}
RANDOM = {"method": "random", "keep": 0.5}


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@functools.cache
def built(name):
    pipe, sample = PIPELINES[name]()
    return pipe, sample, sample()


CASES = [
    ("text_to_image", EDM),
    ("image_to_image", RANDOM),
    ("controlled", RANDOM),
    ("flux", EDM),
]
MORE = [
    ("inpainting", EDM),
    ("dit", EDM),
    ("pixart", EDM),
    ("image_to_image", EDM),
    ("controlled", EDM),
    ("sdxl", RANDOM),
    ("sdxl", EDM),
    ("dit", RANDOM),
    ("sd3", EDM),
]


@pytest.mark.parametrize(
    ("name", "arguments"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)]
)
def test_a_pipeline_runs_with_one_set_of_tokens_for_both_halves_of_guidance(name, arguments):
    pipe, sample, plain = built(name)
    before = traces(denoiser(pipe))
    tokenprune.patch(pipe, arguments["method"], keep=1.0)
    assert torch.equal(sample(), plain)
    tokenprune.patch(pipe, **arguments)
    with tokenprune.record(pipe) as recording:
        patched = sample()
    assert torch.equal(sample(), patched)  # nothing of a run reaches the next
    assert torch.isfinite(patched).all()
    assert not torch.allclose(patched, plain, rtol=1e-2)
    calls = 2 if name == "flux" else 1
    steps = [forward.timestep for forward in recording.forwards[::calls]]
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == len(steps)
    for first, second in zip(recording.forwards[::calls], recording.forwards[calls - 1 :: calls], strict=True):
        assert first.places
        for one, other in zip(first.places, second.places, strict=True):
            assert one.kept.shape[1] == round(0.5 * one.source.shape[1])
            assert torch.equal(one.kept, other.kept)
            assert all(torch.equal(part, one.kept[:1]) for part in one.kept.split(1))
    report = tokenprune.report(pipe).to_dict()
    assert {place["name"] for place in report["places"]} == {place.name for place in recording.forwards[0].places}
    tokenprune.unpatch(pipe)
    assert torch.equal(sample(), plain)
    assert traces(denoiser(pipe)) == before


def test_control_residuals_reach_the_patched_model():
    pipe, sample, _ = built("controlled")
    tokenprune.patch(pipe, **EDM)
    without = sample(controlnet_conditioning_scale=0.0)
    assert not torch.allclose(sample(), without, rtol=1e-2)
    tokenprune.unpatch(pipe)


def test_callbacks_see_each_step_and_may_change_latents_and_guidance():
    pipe, sample, _ = built("text_to_image")
    tokenprune.patch(pipe, **EDM)
    plain, told = sample(), []

    def watch(pipe, step, timestep, tensors):
        told.append((step, int(timestep)))
        return {"latents": tensors["latents"].clone()}

    assert torch.equal(sample(callback_on_step_end=watch), plain)
    assert [step for step, _ in told] == [0, 1, 2]

    def stop_guidance(pipe, step, timestep, tensors):
        if step == 0:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    def by_hand(latents):
        # One guided step, then unguided ones.
        for index, timestep in enumerate(pipe.scheduler.timesteps):
            words = torch.cat([-words_of(sample), words_of(sample)]) if index == 0 else words_of(sample)
            doubled = torch.cat([latents] * 2) if index == 0 else latents
            with torch.no_grad():
                noise = pipe.unet(doubled, timestep, encoder_hidden_states=words).sample
            if index == 0:
                noise = noise[:1] + 7.5 * (noise[1:] - noise[:1])
            latents = pipe.scheduler.step(noise, timestep, latents, eta=0.0).prev_sample
        return latents

    found = sample(callback_on_step_end=stop_guidance, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    latents = torch.randn(1, 4, 32, 24, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(3)
    torch.testing.assert_close(found, by_hand(latents), rtol=1e-5, atol=1e-5)

    def unpatch_at_the_end(pipe, step, timestep, tensors):
        if step == 1:
            tokenprune.unpatch(pipe)
        return {}

    assert not torch.equal(sample(callback_on_step_end=unpatch_at_the_end), plain)
    assert tokenprune.unpatch(pipe) is pipe


def words_of(sample):
    return torch.randn((1, 5, 8), generator=torch.Generator().manual_seed(14))


def ip_adapter_weights(unet):
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape):
        return 0.5 * torch.randn(shape, generator=generator)

    words, wide = 4, unet.config.cross_attention_dim
    projection = {
        "proj.weight": drawn(words * wide, wide), "proj.bias": drawn(words * wide),
        "norm.weight": drawn(wide), "norm.bias": drawn(wide),
    }  # fmt: skip
    blocks = {}
    crossed = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(crossed):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        blocks[f"{2 * index + 1}.to_k_ip.weight"] = drawn(width, wide)
        blocks[f"{2 * index + 1}.to_v_ip.weight"] = drawn(width, wide)
    return {"image_proj": projection, "ip_adapter": blocks}


@pytest.mark.parametrize("arguments", [EDM, pytest.param({"method": "todo", "keep": 0.5}, marks=pytest.mark.full)])
def test_ip_adapter_in_either_order(arguments):
    pipe, sample = PIPELINES["text_to_image"]()
    plain = sample()
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2))
    weights = ip_adapter_weights(pipe.unet)
    processors = dict(pipe.unet.attn_processors)
    found = []
    for order in ("patch", "adapter"):
        if order == "patch":
            tokenprune.patch(pipe, **arguments)
            without = sample()
        pipe.unet._load_ip_adapter_weights([weights])
        if order == "adapter":
            unpatched = sample(ip_adapter_image_embeds=[embeds])
            tokenprune.patch(pipe, **arguments)
        found.append(sample(ip_adapter_image_embeds=[embeds]))
        pipe.set_ip_adapter_scale(0.0)
        torch.testing.assert_close(sample(ip_adapter_image_embeds=[embeds]), without, rtol=1e-4, atol=1e-4)
        tokenprune.unpatch(pipe)
        pipe.set_ip_adapter_scale(1.0)
        if order == "adapter":
            assert torch.equal(sample(ip_adapter_image_embeds=[embeds]), unpatched)
        pipe.unet.set_attn_processor(dict(processors))
        pipe.unet.encoder_hid_proj, pipe.unet.config.encoder_hid_dim_type = None, None
        assert torch.equal(sample(), plain)
    assert torch.equal(*found)
    assert not torch.allclose(found[0], without, rtol=1e-2)
    assert not torch.allclose(found[0], unpatched, rtol=1e-2)


def test_two_pipelines_share_a_patched_model():
    pipe, sample, plain = built("text_to_image")
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    words = words_of(sample)

    def from_image(pipe=other):
        return pipe(
            image=image, strength=0.6, num_inference_steps=5, output_type="latent", prompt_embeds=words,
            negative_prompt_embeds=-words, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    unpatched = from_image()
    tokenprune.patch(pipe, "at_edm", keep=0.5)
    first, second = sample(), from_image()
    assert not torch.equal(second, unpatched)
    assert torch.equal(sample(), first)
    assert torch.equal(from_image(), second)
    sample(num_inference_steps=2)
    assert torch.equal(from_image(), second)
    tokenprune.unpatch(other)
    assert torch.equal(sample(), plain)
    assert torch.equal(from_image(), unpatched)


@pytest.mark.full
@pytest.mark.parametrize("name", ["text_to_image", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("order", ["patch", "offload"])
def test_pipelines_offload_a_patched_model(name, order):
    pipe, sample = PIPELINES[name]()
    plain = sample()
    tokenprune.patch(pipe, **EDM)
    patched = sample()
    if order == "offload":
        tokenprune.unpatch(pipe)
    for switch_on in (lambda: pipe.enable_model_cpu_offload(device="cpu"), lambda: offload_in_sequence(pipe)):
        switch_on()
        if order == "offload":
            tokenprune.patch(pipe, **EDM)
        assert torch.equal(sample(), patched)
        if order == "offload":
            tokenprune.unpatch(pipe)
            assert torch.equal(sample(), plain)
        pipe.remove_all_hooks()
    tokenprune.unpatch(pipe)
    assert torch.equal(sample(), plain)


@pytest.mark.full
@pytest.mark.parametrize("order", ["patch", "offload"])
def test_a_cached_and_offloaded_pipeline_is_patched(order):
    pipe, sample = PIPELINES["flux"]()
    plain = sample(true_cfg_scale=1.0)
    config = diffusers.FirstBlockCacheConfig(threshold=0.5)

    def cached():
        return sample(true_cfg_scale=1.0)

    tokenprune.patch(pipe, **EDM)
    pipe.transformer.enable_cache(config)
    expected = cached()
    pipe.transformer.disable_cache()
    tokenprune.unpatch(pipe)
    if order == "patch":
        tokenprune.patch(pipe, **EDM)
    offload_in_sequence(pipe)
    pipe.transformer.enable_cache(config)
    if order == "offload":
        tokenprune.patch(pipe, **EDM)
    assert torch.equal(cached(), expected)
    assert not torch.equal(expected, plain)
