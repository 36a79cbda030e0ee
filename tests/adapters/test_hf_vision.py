"""transformers' image towers under the promises that timm's vision transformers keep."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hf_families
import pytest
import torch
from families import states_in_memory
from hf_families import DEPTH, GRID, HOLDERS, MODELS, TOWERS, build, call, images, tensors
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune.adapters import hf_vision
from tokenprune.taps import Taps

ROOT = Path(__file__).parents[2]
COUNTS = json.loads((ROOT / "tests" / "counts.json").read_text())["transformers"]
PATCHES = GRID[0] * GRID[1]
EVERYWHERE = dict.fromkeys(range(DEPTH), 1.0)
ALL_STATES = {"output_hidden_states": True}
FEW = ("clip", "siglip", "beit", "dinov3")  # of each way in which tokens are indexed
IMPLEMENTATIONS = ["sdpa", pytest.param("eager", marks=pytest.mark.full)]


def most_in_full(names: Iterable[str], *few: str) -> list[Any]:
    """All names, those beside `few` only in the full tier."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.full) for name in names]


def outputs(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    return tensors(call(model, x, **kwargs))


def assert_equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    assert not [name for name in mine if not torch.equal(mine[name], other[name])]


def kept_in(model: nn.Module, x: Tensor, **kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs and the original patches that leave the last place, [B, K]."""
    with tokenprune.record(model) as recording:
        found = outputs(model, x, **kwargs)
    return found, recording.forwards[0].places[-1].kept


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", most_in_full(MODELS, "beit", "dinov3", "siglip_model"))
def test_a_budget_of_one_and_unpatch_are_bit_identical(name: str, attention: str) -> None:
    model, x = build(name, attention), images()
    plain = outputs(model, x, **ALL_STATES)
    before = [(type(m), dict(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    tokenprune.patch(model, "top_k", keep=1.0)
    assert_equal(outputs(model, x, **ALL_STATES), plain)
    tokenprune.patch(model, "tome", flops=0.7)
    assert not torch.equal(outputs(model, x)[next(iter(outputs(model, x)))], plain[next(iter(plain))])
    tokenprune.unpatch(model)
    after = [(type(m), dict(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    assert before == after
    assert_equal(outputs(model, x, **ALL_STATES), plain)


@pytest.mark.parametrize("name", most_in_full(TOWERS, "clip", "beit"))
def test_machinery_that_keeps_all_is_bit_identical(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(name), images()
    plain = outputs(model, x, **ALL_STATES)
    tokenprune.patch(model, "top_k", schedule=EVERYWHERE)
    ran: list[int] = []
    record = Taps.record
    monkeypatch.setattr(Taps, "record", lambda self, *args: (ran.append(self.index), record(self, *args))[1])
    assert_equal(outputs(model, x, **ALL_STATES), plain)
    assert ran == list(range(DEPTH))


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", most_in_full(TOWERS, *FEW))
def test_a_permuted_and_restored_order(name: str, attention: str) -> None:
    """ToMe's leaving order is the even tokens, then the odd ones: all that is indexed by token must follow."""
    model, x = build(name, attention).double(), images().double()
    plain = outputs(model, x, **ALL_STATES)
    for restore, schedule in (("unmerge", EVERYWHERE), ("fusion", dict.fromkeys(range(DEPTH - 1), 1.0))):
        tokenprune.patch(model, "tome", schedule=schedule, restore=restore)
        mine, kept = kept_in(model, x, **ALL_STATES)
        assert not torch.equal(kept[0], torch.arange(PATCHES))
        for key, value in plain.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", most_in_full(MODELS, "dinov2_backbone"))
def test_every_output_keeps_its_shape(name: str) -> None:
    model, x = build(name), images()
    plain = outputs(model, x, **ALL_STATES)
    for method in ("tome", "top_k", "zero_tprune"):
        tokenprune.patch(model, method, keep=0.4)
        mine = outputs(model, x, **ALL_STATES)
        assert {key: value.shape for key, value in mine.items()} == {key: v.shape for key, v in plain.items()}
        assert all(value.isfinite().all() for value in mine.values())


@pytest.mark.parametrize("name", most_in_full(TOWERS, "siglip", "dinov2_registers"))
def test_tokens_dropped_in_the_last_layer(name: str) -> None:
    """The hidden states of those kept are the unpatched ones at their own positions, the others are
    estimated from them; prefix tokens stay."""
    model, x = build(name), images()
    prefix = MODELS[name][2]
    plain = outputs(model, x, **ALL_STATES)
    tokenprune.patch(model, "top_k", schedule={DEPTH - 1: 0.5})
    mine, kept = kept_in(model, x, **ALL_STATES)
    for key in ("last_hidden_state", f"hidden_states.{DEPTH}"):
        torch.testing.assert_close(mine[key][:, :prefix], plain[key][:, :prefix], rtol=1e-4, atol=1e-4)
        for i in range(len(x)):
            body, reference = mine[key][i, prefix:], plain[key][i, prefix:]
            torch.testing.assert_close(body[kept[i]], reference[kept[i]], rtol=1e-4, atol=1e-4)
            dropped = sorted(set(range(PATCHES)) - set(kept[i].tolist()))
            assert len(dropped) == PATCHES // 2
            assert not torch.allclose(body[dropped], reference[dropped], rtol=1e-3, atol=1e-3)
            if key != "last_hidden_state":  # which is normalised behind
                rows, lost = body[kept[i]].double(), body[dropped].double()
                weights = torch.linalg.lstsq(rows.T, lost.T).solution
                torch.testing.assert_close(weights.T @ rows, lost, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hidden_states_are_full_whenever_they_were_first_asked_for(hooked_first: bool) -> None:
    """transformers leaves its recording hooks on the layers: before the patch's in one case, behind them in the
    other."""
    model, x = build("clip"), images()
    plain = outputs(model, x)
    if hooked_first:
        outputs(model, x, **ALL_STATES)
    tokenprune.patch(model, "tome", keep=0.4)
    mine = outputs(model, x, **ALL_STATES)
    assert [len(mine[f"hidden_states.{i}"][0]) for i in range(DEPTH + 1)] == [1 + PATCHES] * (DEPTH + 1)
    distinct = [len(mine[f"hidden_states.{i}"][0, 1:].unique(dim=0)) for i in range(DEPTH + 1)]
    places = tokenprune.report(model).to_dict()["places"]
    assert distinct == [PATCHES, *(place["tokens_out"] for place in places)]
    assert torch.equal(mine["last_hidden_state"], outputs(model, x)["last_hidden_state"])
    for asked, found in ((-2, [3]), ([1, -1], [1, 4])):
        some = outputs(model, x, output_hidden_states=asked)
        for i in found:
            assert torch.equal(some[f"hidden_states.{i}"], mine[f"hidden_states.{i}"])
    tokenprune.unpatch(model)
    assert_equal(outputs(model, x), plain)


def counted(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("method", ["tome", "top_k"])
@pytest.mark.parametrize("name", most_in_full(TOWERS, "siglip", "beit"))
def test_the_budget_is_met(name: str, method: str) -> None:
    """Counted anew over the real forward; with 36 tokens one of them is half a percent."""
    model, x = build(name), images(1)
    plain = counted(model, x)
    tokenprune.patch(model, method, flops=0.7)
    report = tokenprune.report(model).to_dict()
    assert report["family"] == "hf_vision"
    assert not report["skipped"]
    assert abs(counted(model, x) / plain - 0.7) < 0.01
    assert abs(report["flops_ratio"] - 0.7) < 0.01


def test_at_real_size_the_budget_is_met_within_a_percent() -> None:
    import transformers

    with torch.device("meta"):
        model = transformers.CLIPVisionModel._from_config(transformers.CLIPVisionConfig(patch_size=16)).eval()
    tokenprune.patch(model, "tome", flops=0.6)
    assert abs(tokenprune.report(model).to_dict()["flops_ratio"] - 0.6) < 0.002


@pytest.mark.parametrize("name", most_in_full(["clip", "siglip", "vit", "beit", "dinov2", "dinov3"], "clip", "beit"))
def test_other_sizes_and_images_that_are_not_square(name: str) -> None:
    model = build(name).double()
    x = images(2, (5 * 4, 7 * 4)).double()
    if name.startswith("dino"):
        interpolated: dict[str, Any] = {}
    else:
        interpolated = {"interpolate_pos_encoding": True}
    plain = outputs(model, x, **interpolated)
    tokenprune.patch(model, "tome", schedule=EVERYWHERE)
    for key, value in outputs(model, x, **interpolated).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-6)
    tokenprune.patch(model, "top_k", keep=0.5)
    with tokenprune.record(model) as recording:
        mine = outputs(model, x, **interpolated)
    assert recording.forwards[0].grid == (5, 7)
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in plain.items()}


@pytest.mark.parametrize("name", ["clip_model", "siglip_model"])
def test_zero_shot_classification(name: str) -> None:
    """Texts' embeddings are untouched, images' change more where more is removed."""
    model, x = build(name), images(5)
    plain = outputs(model, x)
    assert plain["logits_per_image"].shape == (5, 3)
    differences = []
    for keep in (35 / 36, 0.2):
        tokenprune.patch(model, "top_k", schedule={0: keep})
        mine = outputs(model, x)
        assert torch.equal(mine["text_embeds"], plain["text_embeds"])
        assert mine["logits_per_image"].shape == (5, 3)
        differences.append(float((mine["logits_per_image"] - plain["logits_per_image"]).abs().max()))
        features = model.get_image_features(pixel_values=x).pooler_output
        torch.testing.assert_close(features / features.norm(dim=-1, keepdim=True), mine["image_embeds"])
    assert 0 < differences[0] < differences[1]


@pytest.mark.parametrize("name", most_in_full(TOWERS, "clip", "beit"))
def test_images_of_a_batch_do_not_depend_on_each_other(name: str) -> None:
    model, x = build(name), images(3)
    for method in ("top_k", "tome", "ats"):
        tokenprune.patch(model, method, keep=0.5)
        together = outputs(model, x, **ALL_STATES)
        for i in range(3):
            for key, value in outputs(model, x[i : i + 1], **ALL_STATES).items():
                torch.testing.assert_close(value[0], together[key][i], rtol=1e-4, atol=1e-4)
    assert len({tuple(p["fewest"] for p in tokenprune.report(model).to_dict()["places"])}) == 1


@pytest.mark.parametrize("name", most_in_full(["clip", "beit", "dinov3"], "beit"))
def test_adaptive_sampling_runs_eager_and_fused_alike(name: str) -> None:
    x = images(3)
    both = []
    for attention in ("sdpa", "eager"):
        model = build(name, attention)
        tokenprune.patch(model, "ats", keep=0.5)
        both.append(kept_in(model, x, **ALL_STATES))
    assert torch.equal(both[0][1], both[1][1])
    for key, value in both[0][0].items():
        torch.testing.assert_close(both[1][0][key], value, rtol=1e-4, atol=1e-4)


def gradients(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(pixel_values=x, **kwargs)
    loss = output.last_hidden_state.square().sum()
    loss = loss + sum(h.square().mean() for h in output.hidden_states or ())
    loss.backward()
    # A key's bias moves all logits of a row alike: its gradient is rounding.
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in n}


@pytest.mark.parametrize("method", ["tome", "ats"])
@pytest.mark.parametrize("name", most_in_full(["clip", "beit", "dinov3"], "beit"))
def test_gradient_checkpointing_changes_nothing(name: str, method: str) -> None:
    """transformers runs a layer's forward once more without the layer's hooks."""
    before = states_in_memory()
    model, x = build(name).train(), images(3)
    tokenprune.patch(model, method, keep=0.5)
    wanted = gradients(model, x, **ALL_STATES)
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        for key, value in gradients(model, x, **ALL_STATES).items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=1e-4 * float(wanted[key].abs().max()))
        model.activation_checkpointing_disable()
    assert states_in_memory() <= before


def test_two_forwards_of_different_sizes_and_one_backward_under_checkpointing() -> None:
    model = build("clip").train()
    tokenprune.patch(model, "top_k", keep=0.5)

    def run() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        small = model(pixel_values=images(2)).last_hidden_state
        large = model(pixel_values=images(1, (20, 32)), interpolate_pos_encoding=True).last_hidden_state
        (small.square().mean() + large.square().mean()).backward()
        return [p.grad.clone() for n, p in model.named_parameters() if p.grad is not None]

    wanted = run()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for mine, other in zip(run(), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_every_parameter_gets_a_gradient() -> None:
    model, x = build("siglip").train(), images()
    tokenprune.patch(model, "tome", keep=0.5)
    model(pixel_values=x).pooler_output.sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("name", most_in_full(["clip_model", "beit", "dinov2_registers"], "beit"))
def test_copies_pickles_and_saves(name: str, tmp_path: Path) -> None:
    model, x = build(name), images()
    keys = list(model.state_dict())
    tokenprune.patch(model, "tome", keep=0.5)
    patched = outputs(model, x)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(outputs(other, x), patched)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        assert_equal(outputs(model, x), patched)
        tokenprune.unpatch(other)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    tokenprune.unpatch(model)
    assert_equal(outputs(loaded, x), outputs(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_half_precision(dtype: torch.dtype) -> None:
    for name in FEW:
        model, x = build(name), images()
        tokenprune.patch(model, "tome", keep=0.5)
        found = outputs(model.to(dtype), x.to(dtype))
        assert all(value.dtype == dtype and value.isfinite().all() for value in found.values())
        with torch.autocast("cpu", dtype):
            found = outputs(model.float(), x)
        assert all(value.isfinite().all() for value in found.values())


def test_threads_share_a_model() -> None:
    model = build("clip")
    tokenprune.patch(model, "tome", keep=0.5)
    batches = [images(size, seed=size) for size in (1, 2, 3, 4)]
    wanted = [outputs(model, x, **ALL_STATES) for x in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            mine = outputs(model, batches[index], **ALL_STATES)
            if any(not torch.equal(mine[key], wanted[index][key]) for key in wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", most_in_full(["clip", "beit", "dinov3", "internvl"], "clip"))
def test_compiles_in_one_graph(name: str) -> None:
    model, x = build(name), images()
    for method in ("tome", "top_k"):
        torch._dynamo.reset()
        tokenprune.patch(model, method, keep=0.5)
        eager = outputs(model, x)
        graphs = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        for key, value in outputs(compiled, x).items():
            torch.testing.assert_close(value, eager[key], rtol=1e-5, atol=1e-5)
        outputs(compiled, images(seed=1))
        assert graphs.frame_count == 1
    torch._dynamo.reset()


def test_a_tower_inside_an_lvlm() -> None:
    """LLaVA reads the hidden states of the last layer but one: they come on the full grid."""
    import transformers

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**hf_families.SHAPE, **hf_families.MLP).to_dict(),
        text_config=transformers.LlamaConfig(**hf_families.TEXT, num_key_value_heads=2).to_dict(),
        image_token_index=98,
        image_seq_length=PATCHES,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlavaForConditionalGeneration._from_config(config).eval()
    hf_families.randomise(model, 0)
    x, prompt = images(2), torch.tensor([[1, *[98] * PATCHES, 5, 6]] * 2)
    plain = model.generate(input_ids=prompt, pixel_values=x, max_new_tokens=4, do_sample=False)
    tower = model.model.vision_tower
    features = model.get_image_features(pixel_values=x).pooler_output
    with pytest.raises(tokenprune.UnsupportedMethod, match=r"model\.model\.vision_tower"):
        tokenprune.patch(model, "tome", keep=0.5)
    tokenprune.patch(tower, "tome", schedule=EVERYWHERE, proportional=False)
    whole = model.get_image_features(pixel_values=x).pooler_output
    for mine, other in zip(whole, features, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    tokenprune.patch(tower, "tome", keep=0.4)
    fewer = model.get_image_features(pixel_values=x).pooler_output
    left = tokenprune.report(tower).to_dict()["places"][-2]["tokens_out"]
    for mine, other in zip(fewer, features, strict=True):
        assert mine.shape == other.shape
        assert len(mine.unique(dim=0)) == left < PATCHES
    made = model.generate(input_ids=prompt, pixel_values=x, max_new_tokens=4, do_sample=False)
    assert made.shape == plain.shape
    tokenprune.unpatch(model)
    assert torch.equal(model.generate(input_ids=prompt, pixel_values=x, max_new_tokens=4, do_sample=False), plain)


def attend_without_mask(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    assert mask is None
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None


def test_an_attention_that_takes_no_bias() -> None:
    """It stays in use, scored from queries and keys; what needs a bias is refused, also where it is exchanged later."""
    from transformers import AttentionInterface

    AttentionInterface.register("unbiased", attend_without_mask)
    model, x = build("clip"), images()
    tokenprune.patch(model, "top_k", keep=0.5)
    fused = outputs(model, x)
    tokenprune.patch(model, "tome", keep=0.5)
    model.set_attn_implementation("unbiased")
    with pytest.raises(tokenprune.UnsupportedModel, match="unbiased"):
        model(x)
    with pytest.raises(tokenprune.UnsupportedMethod, match="proportional=False"):
        tokenprune.patch(model, "tome", keep=0.5)
    tokenprune.patch(model, "tome", keep=0.5, proportional=False)
    outputs(model, x)
    tokenprune.patch(model, "top_k", keep=0.5)
    for key, value in outputs(model, x).items():
        torch.testing.assert_close(value, fused[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "vit", "beit", "dinov2"])
def test_masks_and_attention_maps_are_refused(name: str) -> None:
    model, x = build(name, "eager"), images()
    tokenprune.patch(model, "top_k", keep=0.5)
    with pytest.raises(tokenprune.UnsupportedModel, match="output_attentions"):
        model(pixel_values=x, output_attentions=True)
    mask = torch.ones(2, MODELS[name][2] + PATCHES)
    mask[:, -3:] = 0
    mask = mask[:, None, None, :].log() if name == "clip" else mask
    with pytest.raises(tokenprune.UnsupportedModel, match="mask"):
        model(pixel_values=x, attention_mask=mask)
    tokenprune.patch(model, "top_k", keep=1.0)
    assert len(model(pixel_values=x, output_attentions=True).attentions) == DEPTH
    assert outputs(model, x)


def test_towers_that_cannot_be_patched_say_so() -> None:
    import transformers

    naflex = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=9
        )
    )
    with pytest.raises(tokenprune.UnsupportedModel, match="SiglipModel"):
        tokenprune.patch(naflex, "top_k")
    with pytest.raises(tokenprune.UnsupportedModel, match=r"model\.0, model\.1"):
        tokenprune.patch(nn.Sequential(build("clip"), build("vit")), "top_k")
    model = build("clip")
    layer = model.encoder.layers[1]
    layer.__class__ = type("OddLayer", (type(layer),), {})
    with pytest.raises(tokenprune.UnsupportedModel, match="not known"):
        tokenprune.patch(model, "top_k")


class LowRank(nn.Module):
    """A projection with a low-rank part beside it, as PEFT puts one in a projection's place."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("method", ["top_k", "ats"])
def test_a_low_rank_adapter_trains_on_a_patched_tower(method: str) -> None:
    model, x = build("clip").requires_grad_(False), images()
    tokenprune.patch(model, method, keep=0.5)
    patched = outputs(model, x)
    attentions = [module for module in model.modules() if hasattr(module, "q_proj")]
    for attention in attentions:
        attention.q_proj = LowRank(attention.q_proj)
    assert_equal(outputs(model, x), patched)
    model(pixel_values=x).last_hidden_state.square().sum().backward()
    assert all(attention.q_proj.up.weight.grad is not None for attention in attentions)
    # Patched once more, queries are those with the low-rank part.
    for attention in attentions:
        nn.init.normal_(attention.q_proj.up.weight)
    tokenprune.patch(model, method, keep=0.5)
    _, kept = kept_in(model, x)
    for attention in attentions:
        merged = attention.q_proj.base_layer
        with torch.no_grad():
            merged.weight += attention.q_proj.up.weight @ attention.q_proj.down.weight
        attention.q_proj = merged
    tokenprune.patch(model, method, keep=0.5)
    assert torch.equal(kept_in(model, x)[1], kept)


@pytest.mark.full
def test_nothing_of_transformers_is_imported_for_others() -> None:
    script = """
        import sys
        import tokenprune
        assert "transformers" not in sys.modules
        import timm, torch
        model = timm.create_model("test_vit").eval()
        tokenprune.patch(model, "tome", keep=0.5)
        assert "transformers" not in sys.modules
        from transformers import CLIPVisionConfig, CLIPVisionModel
        tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=2))
        before = set(sys.modules)
        tokenprune.patch(tower.eval(), "tome", keep=0.5)
        assert not [name for name in set(sys.modules) - before if name.startswith("transformers.models")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env={"PYTHONPATH": str(ROOT)})


def test_the_supported_classes_are_counted(record_property: pytest.FixtureRequest) -> None:
    import transformers

    assert COUNTS["version"] == transformers.__version__
    assert sorted(hf_vision.TOWERS) == COUNTS["towers"]
    assert sorted(hf_vision.ROW_TOWERS) == COUNTS["towers of rows"]
    assert sorted(cls for cls, _, _ in HOLDERS.values()) == COUNTS["held by"]
