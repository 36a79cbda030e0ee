"""Which forwards are one run: schedulers of every kind, interrupted runs, equal noise, rounded timesteps."""

import copy

import diffusers
import pytest
import torch
from denoisers_zoo import build, run
from pipelines_zoo import PIPELINES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenprune

torch.set_num_threads(1)
SECOND_ORDER = ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler")


def computed(pipe, sample, **arguments):
    """Tokens that the first stack computes in each forward of a run, None where it computes all."""
    with tokenprune.record(pipe) as recording:
        sample(**arguments)
    return [forward.places[0].kept.shape[1] if forward.places else None for forward in recording.forwards]


@pytest.mark.parametrize("scheduler", SECOND_ORDER)
def test_a_scheduler_that_shows_a_timestep_twice_makes_one_run(scheduler):
    pipe, sample = PIPELINES["dit"]()
    pipe.scheduler = getattr(diffusers, scheduler)()
    tokenprune.patch(pipe, "ras", rate=0.4, dense_steps=(0,))
    counts = computed(pipe, sample, num_inference_steps=6)
    assert counts == [None] + [26] * (len(pipe.scheduler.timesteps) - 1)
    tokenprune.patch(pipe, "at_edm", flops=0.75, steps={(0.0, 0.4): 0.0})
    counts = computed(pipe, sample, num_inference_steps=6)
    whole = -(-len(counts) * 2 // 5)
    assert counts[:whole] == [None] * whole
    assert None not in counts[whole:]
    assert len(set(counts[whole:])) == 1
    assert tokenprune.report(pipe).to_dict()["flops_ratio"] == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("method", ["region", "toca"])
def test_a_run_that_was_interrupted_leaves_nothing_to_the_next(method):
    pipe, sample = PIPELINES["text_to_image"]()
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    words = torch.randn((1, 5, 8), generator=torch.Generator().manual_seed(14))
    mask = torch.zeros(32, 24)
    mask[8:16, 8:16] = 1

    def from_image():
        return other(
            image=image, strength=0.4, num_inference_steps=5, output_type="latent", prompt_embeds=words,
            negative_prompt_embeds=-words, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    def fail(pipe, step, timestep, tensors):
        raise KeyError("a callback failed")

    tokenprune.patch(pipe, method, **({"mask": mask} if method == "region" else {}))
    alone = from_image()
    sample(num_inference_steps=5, callback_on_step_end=interrupt)  # at a timestep above those of image to image
    assert torch.equal(from_image(), alone)
    with pytest.raises(KeyError):
        sample(num_inference_steps=5, callback_on_step_end=fail)
    assert torch.equal(from_image(), alone)


@torch.no_grad()
def test_a_forward_that_failed_ends_its_run():
    model, inputs = build("dit")
    x = inputs(1, 16, 16)
    mask = torch.zeros(16, 16)
    mask[5:9, 2:7] = 1
    tokenprune.patch(model, "region", mask=mask)

    def predict(timestep, seed):
        latents = torch.randn(x["hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
        return model(**{**x, "hidden_states": latents, "timestep": torch.tensor([timestep])}).sample

    alone = predict(300, 1)
    predict(900, 0)
    handle = model.transformer_blocks[2].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(800, 0)
    handle.remove()
    assert torch.equal(predict(300, 1), alone)


def test_both_halves_of_guidance_compute_the_same_tokens_where_images_begin_with_the_same_noise():
    pipe, sample = PIPELINES["text_to_image"]()
    tokenprune.patch(pipe, "at_edm", keep=0.5, steps={})
    words = torch.randn((3, 5, 8), generator=torch.Generator().manual_seed(14))
    noise = torch.randn((1, 4, 32, 24), generator=torch.Generator().manual_seed(5)).repeat(3, 1, 1, 1)
    with tokenprune.record(pipe) as recording:
        sample(prompt_embeds=words, negative_prompt_embeds=-words, latents=noise)
    for step, forward in enumerate(recording.forwards):
        for place in forward.places:
            negative, positive = place.kept.chunk(2)
            assert torch.equal(negative, positive)
            if step:
                assert not torch.equal(positive[0], positive[1])
            else:
                assert torch.equal(positive[0], positive[1])


def test_timesteps_in_half_precision_are_found_among_the_schedulers():
    pipe, sample = PIPELINES["flux"]()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    pipe.to(torch.bfloat16)
    half = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        for name, shape in (("prompt_embeds", (1, 5, 8)), ("pooled_prompt_embeds", (1, 8)))
    }
    tokenprune.patch(pipe, "ras", rate=0.4, dense_steps=(0,), steps={(0.5, 1.0): 0.0})
    counts = computed(
        pipe, sample, num_inference_steps=40, true_cfg_scale=1.0, negative_prompt_embeds=None,
        negative_pooled_prompt_embeds=None, **half,
    )  # fmt: skip
    assert counts[0] is None
    assert set(counts[1:20]) == {77}
    assert counts[20:] == [None] * 20


def test_an_image_to_edit_behind_the_latents_hides_no_copies():
    model, inputs = build("unet_sd")
    x = inputs(1, 16, 16)
    model = diffusers.UNet2DConditionModel.from_config(model.config, in_channels=8).eval()
    latents, image = x["sample"], torch.randn(x["sample"].shape, generator=torch.Generator().manual_seed(1))
    # As InstructPix2Pix guides: with text and image, with the image alone, with neither.
    parts = torch.cat([torch.cat([latents, edited], 1) for edited in (image, image, torch.zeros_like(image))])
    words = x["encoder_hidden_states"]
    tokenprune.patch(model, "at_edm", keep=0.5, steps={})
    with torch.no_grad(), tokenprune.record(model) as recording:
        model(parts, 500, encoder_hidden_states=torch.cat([words, -words, -words]))
    assert recording.forwards[0].places
    for place in recording.forwards[0].places:
        assert torch.equal(place.kept, place.kept[:1].expand_as(place.kept))


def test_a_copied_pipeline_goes_by_its_own_scheduler():
    pipe, sample = PIPELINES["flux"]()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    tokenprune.patch(pipe, "random", keep=0.5, steps={(0.0, 0.5): 0.0})
    counts = computed(pipe, sample, num_inference_steps=6, true_cfg_scale=1.0)
    assert counts == [None] * 3 + [96] * 3
    twin, model = copy.deepcopy(pipe), copy.deepcopy(pipe.transformer)
    del pipe
    words, pooled = torch.zeros(1, 5, 8), torch.zeros(1, 8)
    with tokenprune.record(twin) as recording:
        twin(
            prompt_embeds=words, pooled_prompt_embeds=pooled, height=32, width=24, num_inference_steps=6,
            output_type="latent",
        )  # fmt: skip
    assert [bool(forward.places) for forward in recording.forwards] == [False] * 3 + [True] * 3
    assert tokenprune.report(model).to_dict()["method"] == "random"


@torch.no_grad()
def test_windows_larger_than_the_grid_are_refused():
    model, inputs = build("dit")
    tokenprune.patch(model, "tomesd", sx=100)
    with pytest.raises(tokenprune.BudgetError, match="does not fit into the grid of 8 x 8"):
        model(**inputs(2, 16, 16))


def test_a_run_of_dense_steps_alone_says_so():
    pipe, sample = PIPELINES["dit"]()
    tokenprune.patch(pipe, "region", mask=torch.ones(8, 8).triu())
    with pytest.raises(tokenprune.BudgetError, match=r"each of this run's steps \(1\) is a dense one"):
        sample(num_inference_steps=1)


def counted(model, sample, **arguments):
    """Multiply-adds of the denoiser over a whole run, by torch's own count."""
    total, forward = 0, model.forward

    def watched(*args, **kwargs):
        nonlocal total
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
            output = forward(*args, **kwargs)
        total += count.get_total_flops()
        return output

    model.forward = watched
    sample(**arguments)
    del model.forward
    return total


@pytest.mark.parametrize(("method", "options"), [("region", {"dense_steps": (0,)}), ("region", {}), ("toca", {})])
def test_a_run_goes_on_where_guidance_ends(method, options):
    pipe, sample = PIPELINES["text_to_image"]()
    mask = torch.zeros(32, 24)
    mask[8:16, 8:16] = 1
    tokenprune.patch(pipe, method, **options, **({"mask": mask} if method == "region" else {}))

    def end(pipe, step, timestep, tensors):
        if step == 4:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    given = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    counts = computed(pipe, sample, num_inference_steps=8, **given)
    assert len(counts) == 8
    if method == "region":  # at step 5 nothing is kept of latents of that batch
        assert [step for step, count in enumerate(counts) if count is None] == ([0, 5] if options else [0, 1, 2, 5])
    assert tokenprune.report(pipe).to_dict()["places"][0]["steps"].endswith(" of 8 steps")


def test_a_step_with_a_second_call_on_a_part_of_the_batch_is_one_step():
    """SD3's skip-layer guidance: a forward of both halves, then one of the text's half alone, at each step."""
    pipe, sample = PIPELINES["sd3"]()
    mask = torch.zeros(32, 24)
    mask[8:16, 8:16] = 1
    tokenprune.patch(pipe, "region", mask=mask, dense_steps=(0, 2))
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.6}
    with tokenprune.record(pipe) as recording:
        sample(num_inference_steps=6, **skipping)
    steps = {}
    for forward in recording.forwards:
        steps.setdefault(forward.timestep, []).append(bool(forward.places))
    calls = list(steps.values())
    assert max(map(len, calls)) == 2
    first = next(i for i, call in enumerate(calls) if len(call) == 2)
    for i, call in enumerate(calls):
        assert call[0] == (i not in (0, 2))
        if len(call) == 2:
            assert call[1] == (i not in (0, 2, first))
    assert tokenprune.report(pipe).to_dict()["places"][0]["steps"] == "4 of 6 steps"


@pytest.mark.parametrize("name", ["text_to_image", "sdxl"])
def test_what_toca_observes_is_counted_at_the_tokens_of_each_level(name):
    pipe, sample = PIPELINES[name]()
    plain = counted(pipe.unet, sample, num_inference_steps=4)
    tokenprune.patch(pipe, "toca")
    sample(num_inference_steps=4)  # counts what the patch costs
    found = counted(pipe.unet, sample, num_inference_steps=4) / plain
    assert tokenprune.report(pipe).to_dict()["flops_ratio"] == pytest.approx(found, abs=0.005)


def test_the_report_says_where_no_scheduler_is_known_and_where_the_mask_is_everything():
    model, inputs = build("dit")
    x = inputs(1, 16, 16)
    tokenprune.patch(model, "region", mask=torch.ones(16, 16).triu(10))
    for timestep in (900, 500):
        run(model, {**x, "timestep": torch.tensor([timestep])})
    assert any("no scheduler is known" in note for note in tokenprune.report(model).to_dict()["notes"])
    pipe, sample = PIPELINES["dit"]()
    tokenprune.patch(pipe, "region", mask=torch.ones(16, 16))
    sample(num_inference_steps=3)
    notes = tokenprune.report(pipe).to_dict()["notes"]
    assert any("cover every token" in note for note in notes)
    assert not any("no scheduler" in note for note in notes)


class Own:
    timesteps = torch.tensor([900, 500, 100])


def test_a_scheduler_of_the_users_own_needs_no_config():
    pipe = PIPELINES["dit"]()[0]
    tokenprune.patch(pipe, "at_edm", keep=0.5, steps={})
    pipe.scheduler = Own()
    with tokenprune.record(pipe) as recording:
        run(pipe.transformer, build("dit")[1](1, 16, 16))  # goes by the noise
    assert recording.forwards[0].places


def test_shares_of_a_run_are_of_the_steps_that_it_has_left():
    pipe, sample = PIPELINES["text_to_image"]()
    mask = torch.zeros(32, 24)
    mask[8:16, 8:16] = 1
    tokenprune.patch(pipe, "region", mask=mask, dense_steps=(0, 0.1, 0.5))
    for steps, dense in ((5, {0, 2}), (10, {0, 1, 5}), (20, {0, 2, 10})):
        counts = computed(pipe, sample, num_inference_steps=steps)
        assert {step for step, count in enumerate(counts) if count is None} == dense
        assert tokenprune.report(pipe).to_dict()["places"][0]["steps"] == f"{steps - len(dense)} of {steps} steps"
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    words = torch.randn((1, 5, 8), generator=torch.Generator().manual_seed(14))
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    given = {"image": image, "prompt_embeds": words, "negative_prompt_embeds": -words, "output_type": "latent"}
    counts = computed(pipe, other, strength=0.5, num_inference_steps=20, **given)
    assert [step for step, count in enumerate(counts) if count is None] == [0, 1, 5]
    assert len(counts) == 10
