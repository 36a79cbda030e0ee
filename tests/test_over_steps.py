"""Methods that take a part of the tokens from an earlier step: `region`, `ras`, `toca`, against loops over a DiT."""

import copy
import gc
import math
import pickle
import weakref

import diffusers
import pytest
import torch
from denoisers_zoo import build, run
from torch.nn import functional

import tokenprune
from tokenprune.denoisers.over_steps import at_steps
from tokenprune.methods.region import EARLY

torch.set_num_threads(1)

METHODS = ("region", "ras", "toca")
LATENTS = {"unet_sd": "sample", "unet_sdxl": "sample"}


def options(method, **more):
    """A small setting of each that computes some tokens, not all, at every step but the dense ones."""
    mask = torch.zeros(16, 16)
    mask[5:9, 2:7] = 1
    each = {
        "region": {"mask": mask, "dense_steps": (0,)},
        "ras": {"rate": 0.4, "dense_steps": (0, 3)},
        "toca": {"rate": 0.3, "interval": 3},
    }
    return {**each[method], **more}


def sequence(model, inputs, name="dit", steps=5, size=(2, 16, 16), copies=1, seed=0, calls=1):
    """Predictions of a run over random latents; `calls` of each step on the same latents."""
    generator = torch.Generator().manual_seed(seed)
    x, latents = inputs(*size), LATENTS.get(name, "hidden_states")
    out = []
    for t in torch.linspace(980, 20, steps).long():
        shown = torch.randn(x[latents][: size[0] // copies].shape, generator=generator)
        step = t / 1000 if name == "flux" else t
        y = {**x, latents: shown.repeat(copies, *[1] * (shown.ndim - 1)), "timestep": step.expand(x["timestep"].shape)}
        for call in range(calls):
            z = {**y, "class_labels": y["class_labels"] + call} if "class_labels" in y else y
            out.append(run(model, z))
    return out


class Loops:
    """A DiT's forward, token by token: which tokens are computed, and what the others take, is said from outside."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs
        self.rows = {}

    def attention(self, block, normed, i, active):
        """Self-attention's output of all tokens; keys and values of tokens out of `active` are the rows of before."""
        attn = block.attn1
        q, k, v = attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)
        for part, fresh in (("k", k), ("v", v)):
            known = self.rows.get((i, part), fresh).clone()
            for b, tokens in enumerate(active):
                for token in tokens:
                    known[b, token] = fresh[b, token]
            self.rows[i, part] = known
        k, v = self.rows[i, "k"], self.rows[i, "v"]
        heads = [slice(h * 4, h * 4 + 4) for h in range(attn.heads)]
        maps = [torch.softmax(q[..., h] @ k[..., h].transpose(1, 2) / 2.0, -1) for h in heads]
        self.maps = torch.stack(maps, 1)
        return attn.to_out[0](torch.cat([a @ v[..., h] for a, h in zip(maps, heads, strict=True)], -1))

    def predict(self, latents, t, labels, block_forward):
        model = self.model
        hidden = model.pos_embed(latents)
        for i, block in enumerate(model.transformer_blocks):
            hidden = block_forward(i, block, hidden, t, labels)
        condition = model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=hidden.dtype)
        shift, scale = model.proj_out_1(functional.silu(condition)).chunk(2, 1)
        hidden = model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None]
        patches = model.proj_out_2(hidden).view(-1, 8, 8, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(-1, 8, 16, 16)

    def of_tokens(self, active):
        """Blocks of which only the tokens `active` are computed."""

        def forward(i, block, hidden, t, labels):
            normed, gate, shift, scale, gate_mlp = block.norm1(hidden, t, labels, hidden_dtype=hidden.dtype)
            out = hidden + gate[:, None] * self.attention(block, normed, i, active)
            out = out + gate_mlp[:, None] * block.ff(block.norm3(out) * (1 + scale[:, None]) + shift[:, None])
            new = hidden.clone()
            for b, tokens in enumerate(active):
                for token in tokens:
                    new[b, token] = out[b, token]
            return new

        return forward

    def of_mlps(self, choose, dense):
        """Blocks that keep attention, and all MLP outputs but those of the tokens `choose(i)`."""

        def forward(i, block, hidden, t, labels):
            normed, gate, shift, scale, gate_mlp = block.norm1(hidden, t, labels, hidden_dtype=hidden.dtype)
            everyone = [range(64)] * len(hidden)
            active = everyone if dense else choose(i)
            if dense:
                self.rows[i, "attention"] = self.attention(block, normed, i, everyone)
                self.rows[i, "map"] = self.maps
            hidden = hidden + gate[:, None] * self.rows[i, "attention"]
            fresh = block.ff(block.norm3(hidden) * (1 + scale[:, None]) + shift[:, None])
            known = self.rows.get((i, "mlp"), fresh).clone()
            for b, tokens in enumerate(active):
                for token in tokens:
                    known[b, token] = fresh[b, token]
            self.rows[i, "mlp"] = known
            return hidden + gate_mlp[:, None] * known

        return forward


def patchwise(active, fresh, before):
    """`fresh` where the tokens `active` are (patches of 2 x 2 latents in a grid of 8 x 8), else `before`."""
    out = before.clone()
    for b, tokens in enumerate(active):
        for token in tokens:
            rows, columns = slice(token // 8 * 2, token // 8 * 2 + 2), slice(token % 8 * 2, token % 8 * 2 + 2)
            out[b, :, rows, columns] = fresh[b, :, rows, columns]
    return out


def shown_latents(steps, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((batch, 4, 16, 16), generator=generator) for _ in range(steps)]


def times(steps):
    return [t.expand(2) for t in torch.linspace(980, 20, steps).long()]


@torch.no_grad()
def naive_region(model, steps=5):
    # The mask covers latents of rows 5 to 8 and columns 2 to 6: tokens 2 to 4 by 1 to 3, with a ring 1 to 5 by 0 to 4.
    inside = [r * 8 + c for r in range(1, 6) for c in range(5)]
    loops, out = Loops(model, None), []
    for step, (t, x) in enumerate(zip(times(steps), shown_latents(steps), strict=True)):
        active = [range(64) if step == 0 else inside] * 2
        fresh = loops.predict(x, t, torch.arange(2), loops.of_tokens(active))
        out.append(patchwise(active, fresh, out[-1]) if out else fresh)
    return out


@torch.no_grad()
def naive_ras(model, steps=5, low=True):
    loops, out, dropped = Loops(model, None), [], [[0] * 64, [0] * 64]
    for step, (t, x) in enumerate(zip(times(steps), shown_latents(steps), strict=True)):
        active = [range(64)] * 2
        if step not in (0, 3):
            active = []
            for b in range(2):
                metric = []
                for token in range(64):
                    r, c = token // 8 * 2, token % 8 * 2
                    cells = [out[-1][b, :4, r + i, c + j].std() for i in (0, 1) for j in (0, 1)]
                    starved = math.exp(0.1 * dropped[b][token])
                    value = float(sum(cells)) / 4
                    metric.append(starved / value if low else starved * value)
                active.append(sorted(range(64), key=metric.__getitem__, reverse=True)[: math.ceil(0.4 * 64)])
                for token in set(range(64)) - set(active[-1]):
                    dropped[b][token] += 1
        fresh = loops.predict(x, t, torch.arange(2), loops.of_tokens(active))
        out.append(patchwise(active, fresh, out[-1]) if out else fresh)
    return out


@torch.no_grad()
def naive_toca(model, steps=5):
    loops, out, stale = Loops(model, None), [], {}
    for step, (t, x) in enumerate(zip(times(steps), shown_latents(steps), strict=True)):
        # No scheduler says where in the run this is, so the noise does.
        position = 1 - float(t[0]) / 1000

        def choose(i, position=position, stale=stale):
            active = []
            count = int(min(max(0.3 * (4 * position - 1) * (0.8 + 0.4 * i / 3), 0), 1) * 64)
            for b in range(2):
                waited = stale.setdefault((i, b), [0] * 64)
                mass = loops.rows[i, "map"][b].mean(0).sum(0)
                scores = [float(mass[n] / mass.norm()) + 0.25 * waited[n] / 3 for n in range(64)]
                raised = list(scores)
                for corner in (r * 8 + c for r in range(0, 8, 2) for c in range(0, 8, 2)):
                    raised[max((corner, corner + 1, corner + 8, corner + 9), key=scores.__getitem__)] *= 1.6
                active.append(sorted(range(64), key=raised.__getitem__, reverse=True)[:count])
                stale[i, b] = [0 if n in active[-1] else waited[n] + 1 for n in range(64)]
            return active

        dense = step % 3 == 0
        if dense:
            stale.clear()
        out.append(loops.predict(x, t, torch.arange(2), loops.of_mlps(choose, dense)))
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_dit_equals_its_loops(method):
    model, inputs = build("dit")
    plain = sequence(model, inputs)
    naive = {"region": naive_region, "ras": naive_ras, "toca": naive_toca}[method](model)
    tokenprune.patch(model, method, **options(method))
    out = sequence(model, inputs)
    for step, (ours, theirs) in enumerate(zip(out, naive, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()), msg=f"step {step}")
    assert torch.equal(out[0], plain[0])
    assert not torch.allclose(out[1], plain[1], atol=1e-3)


def test_ras_in_the_other_direction_equals_its_loops():
    model, inputs = build("dit")
    tokenprune.patch(model, "ras", **options("ras", active="high"))
    for ours, theirs in zip(sequence(model, inputs), naive_ras(model, low=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    ["dit", "sd3", "flux", *(pytest.param(name, marks=pytest.mark.full) for name in ("pixart", "sd35", "unet_sdxl"))],
)
def test_nothing_changes_where_all_is_computed_and_behind_unpatch(name, method):
    model, inputs = build(name)
    size = (2, 16, 16) if name == "dit" else (2, 16, 12)
    plain, traces = sequence(model, inputs, name, 3, size), state(model)
    refused = {("toca", "flux"): "modules of their own", ("ras", "unet_sdxl"): "convolutions follow"}
    if (method, name) in refused:
        with pytest.raises(tokenprune.UnsupportedMethod, match=refused[method, name]):
            tokenprune.patch(model, method, **options(method))
        return
    assert method in {info.name for info in tokenprune.methods(model)}
    if method == "toca":  # attention is never computed anew between dense steps, so that all is only at these
        tokenprune.patch(model, method, flops=1.0)
    elif method == "ras":
        schedule = dict.fromkeys(range(2 if name == "flux" else 1), 1.0)
        tokenprune.patch(model, method, schedule=schedule, dense_steps=())
    else:
        tokenprune.patch(model, method, mask=torch.ones(size[1:]))
    out = sequence(model, inputs, name, 3, size)
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    smaller = {"mask": options("region")["mask"][:, : size[2]]} if method == "region" else {}
    tokenprune.patch(model, method, **options(method, **smaller))
    first, second = (sequence(model, inputs, name, 3, size) for _ in range(2))
    assert torch.equal(first[0], plain[0])
    assert not torch.equal(first[1], plain[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # nothing is left of the run before
    tokenprune.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(sequence(model, inputs, name, 3, size), plain, strict=True))
    assert state(model) == traces


def state(model):
    """What a patch could leave on a model."""
    return [(type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("method", METHODS)
def test_guidance_in_one_batch_and_in_two_calls_is_the_same(method):
    # Both halves count: in two calls ras sees both predictions of the last step, toca both maps of the dense one.
    model, inputs = build("dit")
    tokenprune.patch(model, method, **options(method))
    apart = sequence(model, inputs, size=(1, 16, 16), calls=2)
    joined = sequence(model, inputs, size=(2, 16, 16), copies=2)
    for step, both in enumerate(joined):
        halves = torch.cat(apart[2 * step : 2 * step + 2])
        torch.testing.assert_close(halves, both, rtol=0, atol=2e-5 * float(both.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_two_models_and_a_broken_forward_do_not_disturb_a_run(method):
    model, inputs = build("dit")
    tokenprune.patch(model, method, **options(method))
    alone = sequence(model, inputs)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    block = model.transformer_blocks[2]

    def broken(module, args):
        raise RuntimeError("broken")

    sequence(model, inputs, steps=3)
    handle = block.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        sequence(model, inputs)
    handle.remove()
    for one in (model, *twins):
        assert all(torch.equal(a, b) for a, b in zip(sequence(one, inputs), alone, strict=True))


def test_what_a_run_keeps_goes_with_the_next_without_a_collection():
    from tokenprune.denoisers import run as runs

    model, inputs = build("dit")
    tokenprune.patch(model, "region", **options("region"))
    gc.disable()
    try:
        sequence(model, inputs)
        first = weakref.ref(next(reversed(runs._THREAD.runs.values())))
        assert first().kept
        sequence(model, inputs)
        assert first() is None
    finally:
        gc.enable()


def test_what_a_run_keeps_goes_with_the_patch():
    from tokenprune.denoisers import run as runs

    gc.collect()
    before = set(runs._THREAD.runs)
    model, inputs = build("dit")
    tokenprune.patch(model, "region", **options("region"))
    sequence(model, inputs)
    assert set(runs._THREAD.runs) > before
    tokenprune.unpatch(model)
    gc.collect()
    assert set(runs._THREAD.runs) <= before


@pytest.mark.parametrize("method", METHODS)
def test_the_report_counts_the_steps_and_a_budget_is_met(method):
    model, inputs = build("dit")
    budget = options("region") if method == "region" else {"flops": 0.55}
    tokenprune.patch(model, method, **budget)
    sequence(model, inputs)
    report = tokenprune.report(model)
    data = report.to_dict()
    assert 0.1 < data["flops_ratio"] < 0.9
    if method == "region":
        assert {(p["tokens_in"], p["tokens_out"], p["steps"]) for p in data["places"]} == {(64, 25, "49 of 50 steps")}
    else:
        assert data["flops_ratio"] == pytest.approx(0.55, abs=0.01)
    assert "an earlier step" in str(report)


def test_what_cannot_be_is_refused():
    model, _ = build("dit")
    errors = tokenprune.BudgetError, tokenprune.UnsupportedMethod
    for method, wrong, message in (
        ("region", {}, r"mask=mask"),
        ("region", options("region", keep=0.5), "takes no other budget"),
        ("region", {"mask": torch.zeros(16, 16)}, "mask is empty"),
        ("region", {"mask": torch.ones(2, 1, 16, 16)}, "one by one"),
        ("region", {"mask": torch.ones(16, 16).numpy()}, "mask is a tensor"),
        ("region", options("region", ring=-1), "ring"),
        ("region", options("region", ring="1"), "ring"),
        ("region", options("region", dense_steps=3), r"dense_steps=\(0, 1\)"),
        ("region", options("region", dense_steps="01"), "whole numbers"),
        ("region", options("region", dense_steps=torch.tensor(0.1)), "whole numbers"),
        ("ras", {"dense_steps": (0, 1.5)}, "whole numbers"),
        ("ras", {"dense_steps": (0, -1)}, "whole numbers"),
        ("region", options("region", dense_steps=(0, math.nan)), "shares of the run below 1"),
        ("region", options("region", dense_steps=(0, 1.0)), "shares of the run below 1"),
        ("region", options("region", steps={(0.0, 0.5): 0.5}), "are 0 and 1"),
        ("ras", {"active": "middle"}, "'low' or 'high'"),
        ("toca", {"interval": 1}, "at least 2"),
        ("toca", {"schedule": {0: 0.5}}, "by its own rule"),
    ):
        with pytest.raises(errors, match=message):
            tokenprune.patch(model, method, **wrong)
    wan, _ = build("wan")
    for method in ("region", "ras"):
        with pytest.raises(tokenprune.UnsupportedMethod, match="fewer queries than keys"):
            tokenprune.patch(wan, method, **options(method))


def test_fused_projections_are_refused():
    model, inputs = build("sd3")
    model.fuse_qkv_projections()
    with pytest.raises(tokenprune.UnsupportedMethod, match="unfuse"):
        tokenprune.patch(model, "region", **options("region"))
    model.unfuse_qkv_projections()
    tokenprune.patch(model, "region", **options("region"))
    model.fuse_qkv_projections()
    with pytest.raises(tokenprune.UnsupportedMethod, match="unfuse"):
        sequence(model, inputs, "sd3")


def test_inpainting_leaves_the_original_latents_bit_for_bit():
    torch.manual_seed(0)
    model, _ = build("unet_sd")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    pipe = diffusers.StableDiffusionInpaintPipeline(
        vae, None, None, model, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    image, mask = torch.rand(1, 3, 64, 48), torch.zeros(1, 1, 64, 48)
    mask[..., 20:40, 10:30] = 1
    embeds = torch.randn(1, 5, 8)

    def paint(**arguments):
        return pipe(
            prompt_embeds=embeds, negative_prompt_embeds=-embeds, image=image, mask_image=mask, height=64, width=48,
            num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments,
        ).images  # fmt: skip

    plain = paint()
    tokenprune.patch(pipe, "region", mask=mask)
    patched = paint()
    hole = functional.interpolate(mask, plain.shape[2:]).expand_as(plain) > 0
    assert torch.equal(patched[~hole], plain[~hole])
    assert not torch.equal(patched[hole], plain[hole])
    assert torch.equal(paint(strength=0.6), paint(strength=0.6))
    assert {place["steps"] for place in tokenprune.report(pipe).to_dict()["places"]} == {"1 of 2 steps"}


def test_dense_steps_are_numbers_or_shares_of_the_run():
    def dense(named, steps):
        return [step for step in range(steps) if at_steps(named)(step, steps)]

    assert dense(EARLY, 50) == [0, 2, 4, 6, 9, 18]
    assert dense(EARLY, 28) == [0, 1, 2, 3, 5, 10]
    assert dense(EARLY, 20) == [0, 1, 2, 3, 7]
    assert dense(EARLY, 10) == [0, 1, 3]
    assert dense(EARLY, 4) == [0, 1]
    assert dense(EARLY, 2) == [0]
    assert dense(EARLY, 1) == [0]
    assert dense((0, 3, 0.5, 0.999), 8) == [0, 3, 4, 7]
    assert dense((1, 7), 4) == [1]
    assert dense((), 3) == []
