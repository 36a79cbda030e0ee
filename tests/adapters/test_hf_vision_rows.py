"""The towers of the Qwen-VL models, which take all images of a call in one row."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hf_families
import naive_methods
import naive_rows
import naive_vit
import pytest
import torch
import transformers
from families import states_in_memory
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tokenprune

DEPTH = 4
COMMON: dict[str, Any] = {"depth": DEPTH, "num_heads": 3, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3}
WIDE: dict[str, Any] = {**COMMON, "hidden_size": 48, "intermediate_size": 96, "out_hidden_size": 32}
# Each: the class, its configuration, and the merged groups along the side of a window.
MODELS: dict[str, tuple[str, Any, int | None]] = {
    "qwen2_vl": (
        "Qwen2VisionTransformerPretrainedModel",
        lambda: transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
            **COMMON, embed_dim=48, hidden_size=32, mlp_ratio=2
        ),
        None,
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VisionTransformerPretrainedModel",
        lambda: transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
            **WIDE, window_size=16, fullatt_block_indexes=[1, 3]
        ),
        2,
    ),
    "qwen3_vl": (
        "Qwen3VLVisionModel",
        lambda: transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(
            **WIDE, num_position_embeddings=64, deepstack_visual_indexes=[0, 2]
        ),
        None,
    ),
}
GRIDS = ((1, 6, 10), (1, 6, 10), (1, 4, 6), (2, 4, 4))  # two of a size, another, and a video of two frames
SIZES = (60, 60, 24, 16, 16)
ALL_STATES = {"output_hidden_states": True}
EVERYWHERE = dict.fromkeys(range(DEPTH), 1.0)


def most_in_full(*few: str) -> list[Any]:
    """All models, those beside `few` only in the full tier."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.full) for name in MODELS]


NAMES = most_in_full("qwen2_5_vl", "qwen3_vl")


def build(name: str, attention: str = "sdpa") -> Any:
    cls, config, _ = MODELS[name]
    model = {c.__name__: c for c in _classes(name)}[cls]._from_config(config(), attn_implementation=attention)
    hf_families.randomise(model, len(name))
    for parameter_name, parameter in model.named_parameters():
        if "qkv.weight" in parameter_name:
            parameter.data *= 1.5
    return model.eval()


def _classes(name: str) -> list[Any]:
    module = getattr(getattr(transformers.models, name), f"modeling_{name}")
    return [value for value in vars(module).values() if isinstance(value, type)]


def row(grids: Any = GRIDS, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in grids)
    return {"hidden_states": torch.randn(patches, 96, generator=generator), "grid_thw": torch.tensor(grids)}


def outputs(model: nn.Module, x: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(**x, **kwargs)
    found = hf_families.tensors(output)
    return found | {f"deep.{i}": deep for i, deep in enumerate(output.get("deepstack_features") or ())}


def assert_equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    assert not [name for name in mine if not torch.equal(mine[name], other[name])]


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_one_and_unpatch_are_bit_identical(name: str, attention: str) -> None:
    """And so is what scores, selects and restores everywhere and leaves all tokens in."""
    model, x = build(name, attention), row()
    plain = outputs(model, x, **ALL_STATES)
    before = [(type(m), dict(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    tokenprune.patch(model, "top_k", keep=1.0)
    assert_equal(outputs(model, x, **ALL_STATES), plain)
    tokenprune.patch(model, "top_k", schedule=EVERYWHERE)
    assert_equal(outputs(model, x, **ALL_STATES), plain)
    tokenprune.patch(model, "tome", schedule=EVERYWHERE)  # attention with a bias of zeros
    for key, value in outputs(model, x, **ALL_STATES).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-4)
    assert not tokenprune.report(model).to_dict()["skipped"]
    tokenprune.patch(model, "top_k", keep=0.5)
    mine = outputs(model, x, **ALL_STATES)
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in plain.items()}
    assert not torch.equal(mine["pooler_output"], plain["pooler_output"])
    tokenprune.unpatch(model)
    after = [(type(m), dict(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    assert before == after
    assert_equal(outputs(model, x, **ALL_STATES), plain)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("method", ["top_k", "tome"])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_a_loop_over_images_and_segments(name: str, method: str, attention: str) -> None:
    model, x = build(name, attention), row()
    shares = {0: 0.7, 1: 0.8, 2: 0.75}
    reduce = naive_methods.top_k if method == "top_k" else naive_methods.tome
    schedule = {block: naive_vit.leaving_share(share) for block, share in shares.items()}
    oracle = naive_rows.run(model, x["hidden_states"], x["grid_thw"], reduce, schedule, proportional=method == "tome")
    assert min(oracle.margins) > 1e-5
    tokenprune.patch(model, method, schedule=dict(shares))
    with tokenprune.record(model) as recording:
        mine = outputs(model, x, **ALL_STATES)
    window = MODELS[name][2]
    image = 0
    for forward, grid in zip(recording.forwards, [(6, 10), (4, 6), (4, 4)], strict=True):
        assert forward.grid == grid
        laid = naive_rows.laying(*grid, 2, window)
        for index in range(len(forward.places[0].kept)):
            for place, block in zip(forward.places, shares, strict=True):
                kept = oracle.kept[image][block]
                assert sorted(place.kept[index].tolist()) == sorted(laid[i] for i in kept)
                sources = place.source[index].tolist()
                assert all(place.kept[index][sources[laid[i]]] == laid[i] for i in kept)
            image += 1
    assert image == len(SIZES)
    rows = sorted(oracle.hidden)
    assert (len(rows) == sum(SIZES)) == (method == "tome")  # where tokens merge, each has a value
    wanted = torch.stack([oracle.hidden[i] for i in rows])
    torch.testing.assert_close(mine["last_hidden_state"][rows], wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine["hidden_states.2"][rows], _at(oracle.after[1], rows), rtol=1e-3, atol=1e-3)
    if method == "tome":
        for deep, block in enumerate(getattr(model, "deepstack_visual_indexes", ())):
            features = model.deepstack_merger_list[deep](_at(oracle.after[block], rows))
            torch.testing.assert_close(mine[f"deep.{deep}"], features, rtol=1e-3, atol=1e-3)
        tokenprune.unpatch(model)
        pooled = model.merger(wanted)
        if window is not None:  # back into the order of the language model
            pooled = pooled[_groups(window).argsort()]
        torch.testing.assert_close(mine["pooler_output"], pooled, rtol=1e-3, atol=1e-3)


def _at(values: dict[int, Tensor], rows: list[int]) -> Tensor:
    return torch.stack([values[i] for i in rows])


def _groups(window: int) -> Tensor:
    """The merged group of the row without windows that is at each place of the one with them."""
    found, first = [], 0
    for frames, rows, columns in GRIDS:
        plain = naive_rows.laying(rows, columns, 2, None)[::4]
        for _ in range(frames):
            found += [first + plain.index(patch) for patch in naive_rows.laying(rows, columns, 2, window)[::4]]
            first += len(plain)
    return torch.tensor(found)


@pytest.mark.parametrize("name", most_in_full("qwen2_5_vl"))
def test_images_of_a_row_do_not_depend_on_each_other(name: str) -> None:
    model, x = build(name), row()
    tokenprune.patch(model, "top_k", keep=0.4)
    together = outputs(model, x)["last_hidden_state"].split([60, 60, 24, 32])
    pixels = x["hidden_states"].split([60, 60, 24, 32])
    for own, image, grid in zip(pixels, together, x["grid_thw"], strict=True):
        alone = outputs(model, {"hidden_states": own, "grid_thw": grid[None]})["last_hidden_state"]
        torch.testing.assert_close(alone, image, rtol=1e-4, atol=1e-4)
    left = tokenprune.report(model).to_dict()
    assert left["tokens"] == 16
    assert left["places"][-1]["tokens_out"] == 7  # of each frame


def factorised(matrix: Any, *args: Any, **kwargs: Any) -> int:
    return matrix[0] * matrix[-1] ** 3 // 3


def solved(values: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * values[0] * values[-1] * values[-2] ** 2


# What the grid is restored with, which torch's counter does not know.
SOLVERS = {torch.ops.aten.linalg_cholesky_ex: factorised, torch.ops.aten.cholesky_solve: solved}


def counted(model: nn.Module, x: dict[str, Tensor]) -> int:
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False, custom_mapping=SOLVERS) as counter, math:
        model(**x)
    return counter.get_total_flops()


@pytest.mark.parametrize("method", ["top_k", "tome"])
@pytest.mark.parametrize("name", most_in_full("qwen3_vl"))
def test_the_budget_is_met(name: str, method: str) -> None:
    """Counted anew over a real forward, at a size that is not the usual one."""
    model, x = build(name), row([(1, 16, 24)])
    plain = counted(model, x)
    tokenprune.patch(model, method, flops=0.7)
    assert abs(counted(model, x) / plain - 0.7) < 0.01
    report = tokenprune.report(model).to_dict()
    assert report["tokens"] == 16 * 24
    assert abs(report["flops_ratio"] - 0.7) < 0.01


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_at_real_size_the_budget_is_met(name: str) -> None:
    cls = {c.__name__: c for c in _classes(name)}[MODELS[name][0]]
    with torch.device("meta"):
        model = cls._from_config(cls.config_class()).eval()
    tokenprune.patch(model, "top_k", flops=0.6)
    assert abs(tokenprune.report(model).to_dict()["flops_ratio"] - 0.6) < 0.005


def gradients(model: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    output = model(**x, **ALL_STATES)
    loss = output.pooler_output.square().sum() + sum(h.square().mean() for h in output.hidden_states)
    for deep in output.get("deepstack_features") or ():
        loss = loss + deep.square().sum()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["tome", pytest.param("top_k", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", most_in_full("qwen3_vl"))
def test_gradient_checkpointing_changes_nothing(name: str, method: str) -> None:
    before = states_in_memory()
    model, x = build(name).train(), row()
    tokenprune.patch(model, method, keep=0.6)
    wanted = gradients(model, x)
    assert len(wanted) == len(list(model.parameters()))
    model.activation_checkpointing_enable({"use_reentrant": False})
    for key, value in gradients(model, x).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=1e-4 * float(wanted[key].abs().max() + 1e-3))
    assert states_in_memory() <= before


def test_copies_and_pickles() -> None:
    model, x = build("qwen2_5_vl"), row()
    keys = list(model.state_dict())
    tokenprune.patch(model, "top_k", keep=0.5)
    patched = outputs(model, x)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(outputs(other, x), patched)
        tokenprune.unpatch(other)
        assert not torch.equal(outputs(other, x)["pooler_output"], patched["pooler_output"])


@pytest.mark.full
def test_methods_of_many_kinds() -> None:
    """Fused tokens, places behind blocks, clusters: what they leave comes back on the full grid."""
    model, x = build("qwen2_5_vl"), row()
    plain = outputs(model, x)
    names = {info.name for info in tokenprune.methods(model)}
    assert {"top_k", "zero_tprune", "uniform", "random"} <= names
    for name in sorted(names):
        tokenprune.patch(model, name, keep=0.5, **({"restore": "place"} if name == "uniform" else {}))
        mine = outputs(model, x)
        assert {key: value.shape for key, value in mine.items()} == {key: v.shape for key, v in plain.items()}
        assert all(value.isfinite().all() for value in mine.values()), name


def test_what_cannot_be_is_refused() -> None:
    model, x = build("qwen2_vl"), row()
    with pytest.raises(tokenprune.UnsupportedMethod, match="different number of tokens"):
        tokenprune.patch(model, "ats", keep=0.5)
    with pytest.raises(tokenprune.UnsupportedMethod, match="in one row"):
        tokenprune.patch(model, "top_k", keep=0.5, restore="fusion")
    with pytest.raises(tokenprune.UnsupportedMethod, match="dynamicvit learns from images in a batch, and those of a"):
        tokenprune.patch(model, "dynamicvit", keep=0.5)
    tokenprune.patch(model, "top_k", keep=0.5, restore="place")
    tokenprune.patch(model, "top_k", keep=0.5)
    with pytest.raises(tokenprune.UnsupportedModel, match="output_attentions"):
        model(**x, output_attentions=True)
    tokenprune.patch(model, "tome", keep=0.5)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(tokenprune.UnsupportedModel, match="takes no bias"):
        model(**x)
    with pytest.raises(tokenprune.UnsupportedMethod, match="proportional=False"):
        tokenprune.patch(model, "tome", keep=0.5)
    model.config._attn_implementation = "sdpa"
    tokenprune.patch(model, "top_k", keep=0.5)
    hidden = torch.randn(24, 48)
    table = (torch.ones(24, 16), torch.zeros(24, 16))
    with pytest.raises(tokenprune.UnsupportedModel, match="belong to which image"):
        model.blocks[0](hidden, cu_seqlens=torch.tensor([0, 24]), position_embeddings=table)
    assert outputs(model, x)
    tokenprune.unpatch(model)
    model.blocks[1].__class__ = type("OddBlock", (type(model.blocks[1]),), {})
    with pytest.raises(tokenprune.UnsupportedModel, match="not known"):
        tokenprune.patch(model, "top_k")
