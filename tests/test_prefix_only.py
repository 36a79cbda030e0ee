"""Where only prefix tokens are read behind the last block, it computes them alone: the same output for less."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import timm
import timm.layers
import torch
import zoo
from families import build, images, run
from torch import Tensor, nn
from torch.nn import functional as F

import tokenprune
from tokenprune import registry
from tokenprune.registry import make_method, register_method

LAST = 3
SHAPE = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4, "num_classes": 11}
# Each way in which an attention gets queries, keys and bias: name, arguments, whether its queries are narrowed.
ATTENTIONS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "class_token": ("vit_tiny_patch16_224", {}, True),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, True),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, True),
    "query_norm": ("vit_tiny_patch16_224", {"qk_norm": True}, True),
    "rotary": ("eva02_tiny_patch14_224", {"global_pool": "token"}, True),
    "rotary_parts": ("eva02_base_patch14_224", {"global_pool": "token"}, True),
    "rotary_mixed": ("vit_small_patch16_rope_mixed_224", {}, True),
    "rotary_registers": ("vit_small_patch16_dinov3", {"global_pool": "token"}, True),
    "bias_own_table": ("beit_base_patch16_224", {"global_pool": "token"}, True),
    "bias_shared_table": (
        "beit_base_patch16_224",
        {"global_pool": "token", "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        True,
    ),
    "bias_own_mlp": ("vit_relpos_base_patch16_cls_224", {}, True),
    "bias_shared": (
        "vit_srelpos_small_patch16_224",
        {"global_pool": "token", "class_token": True, "fc_norm": False},
        True,
    ),
    "post_norm": ("vit_base_patch16_rpn_224", {"global_pool": "token", "class_token": True}, True),
    "differential": ("vit_dwee_patch16_reg1_gap_256", {"global_pool": "token", "class_token": True}, False),
}
NARROWED = [name for name, (_, _, narrowed) in ATTENTIONS.items() if narrowed]


def create(name: str) -> nn.Module:
    timm_name, kwargs, _ = ATTENTIONS[name]
    model = timm.create_model(timm_name, **{**SHAPE, **kwargs}).eval()
    zoo.randomise(model, 0)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 20, 28)}
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, keys) of each fused attention; a hook on the last block would change what it does."""
    seen: list[tuple[int, int]] = []
    attend = F.scaled_dot_product_attention

    def noting(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((q.shape[2], k.shape[2]))
        return attend(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    return seen


def exactly(got: Tensor, expected: Tensor) -> None:
    """Equal in float64 but for rounding."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def without(model: nn.Module, x: Tensor, method: str, **budget: Any) -> Tensor:
    """The output of a patch that computes every token in the last block."""
    return run(tokenprune.patch(model, method, prefix_only_last=False, **budget), x)


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    return zoo.count(model, x).get_total_flops() // 2


def is_on(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward costs what the report says, with the saving in it."""
    return multiply_adds(model, x[:1]) == tokenprune.report(model).to_dict()["flops_after"]


@pytest.mark.parametrize("method", ["top_k", "tome"])  # with proportional attention too
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_output_is_the_same(name: str, method: str, calls: list[tuple[int, int]]) -> None:
    model = create(name).double()
    x = images(model).double()
    tokenprune.patch(model, method, keep=0.5, prefix_only_last=False)
    calls.clear()
    expected, whole = run(model, x), list(calls)
    tokenprune.patch(model, method, keep=0.5)
    calls.clear()
    exactly(run(model, x), expected)
    last = len(whole) // len(model.blocks)  # differential attention makes two calls
    queries = model.num_prefix_tokens if ATTENTIONS[name][2] else whole[-1][0]
    assert calls[:-last] == whole[:-last]
    assert calls[-last:] == [(queries, whole[-1][1])] * last


@pytest.mark.parametrize("name", NARROWED)
def test_attention_without_the_fused_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create(name).double()
    x = images(model).double()
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = without(model, x, "top_k", keep=0.5)
    tokenprune.patch(model, "top_k", keep=0.5)
    exactly(run(model, x), expected)
    assert "queries and MLP" in str(tokenprune.report(model))


def test_grouped_queries_gates_and_norms() -> None:
    """What no small model of timm has at the end: parts of an attention switched on one by one."""
    for kwargs in ({"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"qkv_fused": False, "num_kv_heads": 2}):
        model = create("rotary_registers")
        kwargs = {"norm_layer": nn.LayerNorm, "num_prefix_tokens": model.num_prefix_tokens, "qkv_bias": True, **kwargs}
        model.blocks[LAST].attn = timm.layers.AttentionRope(96, 4, **kwargs)
        zoo.randomise(model, 1)
        model = model.double().eval()
        x = images(model).double()
        expected = without(model, x, "top_k", keep=0.5)
        tokenprune.patch(model, "top_k", keep=0.5)
        exactly(run(model, x), expected)
        assert "queries and MLP" in str(tokenprune.report(model))


def test_what_it_saves_is_counted() -> None:
    """ViT-S at 257 tokens, one of them dropped: a closed formula for what the last block leaves out."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", patch_size=14).eval()
    x = zoo.inputs(model, 1)
    unpatched = multiply_adds(model, x)
    tokenprune.patch(model, "uniform", schedule={10: 255 / 256}, prefix_only_last=False)
    whole = multiply_adds(model, x)
    assert tokenprune.report(model).to_dict()["flops_after"] == whole
    tokenprune.patch(model, "uniform", schedule={10: 255 / 256})
    counted = multiply_adds(model, x)
    report = tokenprune.report(model).to_dict()
    tokens, width = 256, 384
    left_out = tokens - 1
    assert whole - counted == left_out * (10 * width**2 + 2 * tokens * width)  # queries, projection, MLP; QK, AV
    assert 0.05 < (whole - counted) / unpatched < 0.08
    assert report["flops_after"] == counted
    assert report["flops_before"] == unpatched
    assert any("prefix_only_last=False" in note for note in report["notes"])


@pytest.mark.parametrize("method", ["top_k", "tome"])
def test_a_budget_is_met_with_more_tokens(method: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224").eval()
    x = zoo.inputs(model, 1)
    unpatched, kept = multiply_adds(model, x), []
    for on in (False, True):
        tokenprune.patch(model, method, flops=0.6, prefix_only_last=on)
        assert multiply_adds(model, x) / unpatched == pytest.approx(0.6, abs=0.002)
        assert tokenprune.report(model).to_dict()["flops_ratio"] == pytest.approx(0.6, abs=0.002)
        kept.append([place["tokens_out"] for place in tokenprune.report(model).to_dict()["places"]])
    assert all(more >= few for few, more in zip(*kept, strict=True))
    assert kept[0] != kept[1]


def test_a_budget_that_it_would_undercut_is_met_by_tokens() -> None:
    model = create("class_token")
    x = images(model, 1)
    unpatched = multiply_adds(model, x)
    tokenprune.patch(model, "tome", flops=0.95)
    assert multiply_adds(model, x) / unpatched == pytest.approx(0.95, abs=0.01)
    report = tokenprune.report(model).to_dict()
    assert report["places"][0]["tokens_out"] < report["places"][0]["tokens_in"]
    assert any("undercut" in note for note in report["notes"])


def test_at_another_size_it_costs_what_the_report_says() -> None:
    model = create("class_token")
    model.set_input_size(img_size=(28, 36))
    tokenprune.patch(model, "top_k", keep=0.5)
    dynamic = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SHAPE).eval()
    tokenprune.patch(dynamic, "top_k", keep=0.5)
    x = torch.randn(1, 3, 28, 36)
    assert multiply_adds(dynamic, x) == multiply_adds(model, x)
    report = tokenprune.report(dynamic).to_dict()
    assert report["flops_after"] == pytest.approx(multiply_adds(model, x), rel=1e-3)
    assert report["flops_before"] == pytest.approx(multiply_adds(tokenprune.unpatch(dynamic), x), rel=1e-3)


@pytest.mark.parametrize("name", ["class_token", "rotary_registers", "bias_own_table"])
def test_dense_outputs_have_every_token(name: str) -> None:
    model = create(name)
    x = images(model)
    outputs = []
    for on in (False, True):
        tokenprune.patch(model, "top_k", keep=0.5, prefix_only_last=on)
        run(model, x)
        with torch.no_grad():
            y = x
            outputs.append(
                [
                    model.forward_features(x),
                    model.forward_intermediates(x)[0],
                    *model.forward_intermediates(x, intermediates_only=True),
                    model.forward(x),
                ]
            )
            if name == "class_token":
                outputs[-1] += model.get_intermediate_layers(x, n=2)
                y = model.norm_pre(model._pos_embed(model.patch_embed(x)))  # a loop of the user's own
                for block in model.blocks:
                    y = block(y)
                outputs[-1].append(y)
    for got, expected in zip(outputs[1], outputs[0], strict=True):
        assert torch.equal(got, expected)


def test_a_recording_has_its_places() -> None:
    model = create("class_token")
    x = images(model)
    kept = []
    for on in (False, True):
        tokenprune.patch(model, "tome", keep=0.5, prefix_only_last=on)
        with tokenprune.record(model) as recording:
            output = run(model, x)
        torch.testing.assert_close(run(model, x), output, rtol=1e-4, atol=1e-4)
        kept.append([(place.name, place.kept, place.source) for place in recording.forwards[0].places])
    assert len(kept[0]) == len(kept[1]) == 4
    for (name, ids, source), (other, other_ids, other_source) in zip(*kept, strict=True):
        assert name == other
        assert torch.equal(ids, other_ids)
        assert torch.equal(source, other_source)
    assert is_on(model, x)


@pytest.mark.parametrize("place", ["blocks", "blocks.3", "blocks.3.attn", "blocks.3.mlp.fc1", "norm"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_hook_sees_every_token(place: str, kind: str) -> None:
    model = create("class_token")
    x = images(model)
    tokenprune.patch(model, "top_k", schedule={1: 0.5})
    assert is_on(model, x)
    seen: list[int] = []

    def note(module: nn.Module, args: Any, *output: Any) -> None:
        value = (output or args)[0]
        seen.append((value[0] if isinstance(value, tuple) else value).shape[1])  # backward hooks get tuples

    handle = getattr(model.get_submodule(place), f"register_{kind}_hook")(note)
    model(x).sum().backward()
    assert seen == [36 if (place, kind) == ("blocks", "forward_pre") else 19]
    assert not is_on(model, x)
    handle.remove()
    assert is_on(model, x)
    model.blocks[2].register_forward_hook(note)
    assert is_on(model, x)


@pytest.mark.parametrize("at", [{1: 0.5}, {LAST: 0.5}, {1: 0.5, LAST: 0.5}], ids=str)
@pytest.mark.parametrize("position", ["mid", "post"])
def test_last_block_with_and_without_a_place(at: dict[int, float], position: str) -> None:
    @register_method("by_length")
    def by_length() -> Any:
        """Keep the longest."""
        length = lambda record: record.hidden[:, record.num_prefix_tokens :].norm(dim=-1)  # noqa: E731
        return replace(make_method("top_k", {}), name="by_length", score=length, position=position)

    try:
        model = create("class_token").double()
        x = images(model).double()
        expected = without(model, x, "by_length", schedule=at)
        with tokenprune.record(model) as recording:
            run(model, x)
        tokenprune.patch(model, "by_length", schedule=at)
        assert is_on(model, x)
        exactly(run(model, x), expected)
        features = model.forward_features(x)
        with tokenprune.record(model) as again:
            run(model, x)
        for one, other in zip(recording.forwards[0].places, again.forwards[0].places, strict=True):
            assert torch.equal(one.kept, other.kept)
        tokenprune.patch(model, "by_length", schedule=at, prefix_only_last=False)
        assert torch.equal(model.forward_features(x), features)
    finally:
        registry._METHODS.pop("by_length")


@pytest.mark.parametrize("name", ["class_token", "rotary_registers", "bias_own_table", "bias_own_mlp"])
def test_gradients_are_the_same(name: str) -> None:
    model = create(name).double().train()
    x = images(model).double()
    found = []
    for on in (False, True):
        tokenprune.patch(model, "top_k", keep=0.5, prefix_only_last=on)
        torch.manual_seed(0)
        model(x).square().sum().backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-8, atol=1e-8 * float(grad.abs().max()) + 1e-10, msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_the_last_block_again_as_it_was(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenprune.patch(create("class_token"), "top_k", keep=0.5).train()
    x = images(model)

    def step() -> list[Tensor]:
        output = model(x)
        model.forward_features(x)  # another forward in between
        output.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return grads

    expected = step()
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model.set_grad_checkpointing(True)
    for got, grad in zip(step(), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize(
    "name", [n if n == "class_token" else pytest.param(n, marks=pytest.mark.full) for n in ATTENTIONS]
)
def test_one_graph_and_an_exported_program(name: str) -> None:
    model = create(name)
    x = images(model)
    tokenprune.patch(model, "top_k", keep=0.5)
    expected = run(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-3, atol=1e-3)
    if ATTENTIONS[name][2]:  # no attention of the last block over all queries is in the program
        fused = [node for node in exported.graph.nodes if "scaled_dot_product" in str(node.target)]
        assert fused[-1].meta["val"].shape[2] == model.num_prefix_tokens


def test_a_hook_before_compiling_is_seen_by_the_graph() -> None:
    model = tokenprune.patch(create("class_token"), "top_k", schedule={1: 0.5})
    x = images(model)
    expected, seen = run(model, x), []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-4, atol=1e-4)
    assert seen == [19]


@pytest.mark.parametrize("name", ["class_token", "rotary", "bias_own_table", "bias_own_mlp"])
def test_copies_and_unpatching(name: str) -> None:
    model = create(name)
    x = images(model)
    plain, before = run(model, x), list(contents(model))
    tokenprune.patch(model, "top_k", keep=0.5)
    expected = run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, x), expected)
        assert is_on(other, x)
        tokenprune.unpatch(other)
        assert torch.equal(run(other, x), plain)
        assert [type(module) for module in other.modules()] == [value for key, value in before if key == "class"]
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)
    after = list(contents(model))
    assert [key for key, _ in after] == [key for key, _ in before]
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))


def contents(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for module in model.modules():
        yield "class", type(module)
        for key, value in vars(module).items():
            yield key, value
            if isinstance(value, dict):
                yield from value.items()


class MeanOfPatches(timm.models.vision_transformer.VisionTransformer):
    """A head of the user's own, which reads patch tokens whatever the pooling is called."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 1:].mean(1))


class Mixing(nn.Module):
    """A norm of the user's own, through which the class token reads the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


def test_a_tail_of_the_users_own_gets_every_token() -> None:
    kwargs = {key: value for key, value in SHAPE.items() if key != "num_classes"}
    mean = MeanOfPatches(num_classes=11, **kwargs).eval()
    mean.pretrained_cfg = {"input_size": (3, 20, 28)}
    mixing = create("class_token")
    mixing.norm = Mixing()
    replaced = create("class_token")
    replaced.forward_head = lambda x, pre_logits=False: x[:, 1:].mean(1)
    for model in (mean, mixing, replaced):
        x = images(model)
        expected = without(model, x, "top_k", keep=0.5)
        tokenprune.patch(model, "top_k", keep=0.5)
        assert torch.equal(run(model, x), expected)
        assert not any("prefix" in note for note in tokenprune.report(model).to_dict()["notes"])


def test_pooling_changed_after_the_patch() -> None:
    model = create("class_token")
    x = images(model)
    tokenprune.patch(model, "top_k", keep=0.5)
    run(model, x)
    model.reset_classifier(7, "avg")
    got = run(model, x)
    assert torch.equal(got, without(model, x, "top_k", keep=0.5))


class Adapted(nn.Linear):
    """A projection that is more than its weight, as an adapter makes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x).tanh()


def test_a_projection_that_is_more_than_its_weight_runs_whole(calls: list[tuple[int, int]]) -> None:
    for change in ("before", "after"):
        model = create("class_token").double()
        x = images(model).double()
        adapted = Adapted(96, 288).double()
        if change == "before":
            model.blocks[LAST].attn.qkv = adapted
        tokenprune.patch(model, "top_k", schedule={1: 0.5})
        model.blocks[LAST].attn.qkv = adapted
        calls.clear()
        got = run(model, x)
        assert calls[-1] == (19, 19)
        exactly(got, without(model, x, "top_k", schedule={1: 0.5}))


class MixingMlp(nn.Module):
    """An MLP that looks across tokens."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        return y * (1 + y.mean(1, keepdim=True).tanh())


@pytest.mark.parametrize("name", ["class_token", "distilled"])
def test_an_mlp_that_looks_across_tokens_runs_whole(name: str) -> None:
    model = create(name)
    model.blocks[LAST].mlp = MixingMlp(model.blocks[LAST].mlp)
    x = images(model)
    expected = without(model, x, "top_k", keep=0.5)
    tokenprune.patch(model, "top_k", keep=0.5)
    assert torch.equal(run(model, x), expected)
    assert "gives another output" in str(tokenprune.report(model))


def test_where_it_cannot_be_the_report_says_so() -> None:
    parallel = tokenprune.patch(build("parallel_things"), "top_k", keep=0.5)
    assert "blocks.3: runs on all its tokens" in str(tokenprune.report(parallel))
    adaptive = tokenprune.patch(create("class_token"), "ats", keep=0.5)
    assert "blocks.3: runs on all its tokens" in str(tokenprune.report(adaptive))
    for family in ("map_pool", "mean_pool", "talking_heads"):  # all tokens are read: nothing to say
        model = tokenprune.patch(build(family), "top_k", keep=0.5)
        assert "prefix" not in " ".join(tokenprune.report(model).to_dict()["notes"])


def test_off_where_nothing_is_to_be_saved() -> None:
    model = create("class_token")
    x = images(model)
    expected, unpatched = run(model, x), multiply_adds(model, x)
    for budget in ({"flops": 1.0}, {"keep": 1.0}, {"schedule": dict.fromkeys(range(4), 1.0)}):
        tokenprune.patch(model, "uniform", **budget)
        assert torch.equal(run(model, x), expected)
        assert multiply_adds(model, x) == unpatched
