"""`flip` and `noise_mask`: a training forward is that of the kept patches alone, and nothing else is changed."""

from __future__ import annotations

import copy
import io
from typing import Any

import families
import hf_families
import pytest
import torch
from denoisers_zoo import nothing_is_left
from families import full_but
from hidden_keys import hidden
from torch import Tensor, nn

import tokenprune

torch.set_num_threads(1)
FAMILIES = (
    *("class_token", "registers", "distilled", "map_pool", "mean_pool", "rotary", "rotary_registers"),
    *("bias_own_table", "bias_own_mlp", "post_norm"),
)


def trained(model: nn.Module, x: Tensor, seed: int = 7) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """Output, gradients and kept patches of a training forward and its backward."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with tokenprune.record(model) as recording:
        out = model(x)
    (out * torch.linspace(-1, 1, out.shape[-1])).square().sum().backward()
    return out.detach(), [p.grad for p in model.parameters()], recording.forwards[0].places[0].kept


def assert_all_close(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize(
    "family", full_but(("class_token", "map_pool", "rotary_registers", "bias_own_table"), FAMILIES)
)
def test_a_step_is_that_of_the_kept_patches_alone(family: str) -> None:
    model: Any = families.build(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # of what makes relative positions
            module.p = 0.0
    x = families.images(model, 3)
    tokenprune.patch(model, "flip", keep=0.4)
    out, gradients, kept = trained(model, x)
    tokenprune.unpatch(model)
    prefix = model.num_prefix_tokens
    index = torch.cat([torch.arange(prefix).expand(3, -1), kept + prefix], 1)
    seen = torch.zeros(3, prefix + 35, dtype=torch.bool).scatter(1, index, True)
    model.zero_grad(set_to_none=True)
    with hidden(seen):
        tokens = model.forward_features(x)
        expected = model.forward_head(torch.stack([row[i] for row, i in zip(tokens, index, strict=True)]))
    (expected * torch.linspace(-1, 1, out.shape[-1])).square().sum().backward()
    assert kept.shape == (3, 14)
    assert len({tuple(row) for row in kept.tolist()}) == 3  # each image its own
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-4)
    assert_all_close(gradients, [p.grad for p in model.parameters()])


def test_positions_of_dropped_patches_have_no_gradient() -> None:
    model: Any = families.build("class_token")
    tokenprune.patch(model, "flip", keep=0.4)
    _, _, kept = trained(model, families.images(model, 1))
    moved = model.pos_embed.grad[0, 1:].abs().sum(-1) > 0
    assert sorted(moved.nonzero().flatten().tolist()) == kept[0].tolist()


@pytest.mark.parametrize("method", ["flip", "noise_mask"])
@pytest.mark.parametrize("family", ["class_token", "bias_own_table"])
def test_in_eval_mode_nothing_is_changed(family: str, method: str) -> None:
    model = families.build(family)
    x = families.images(model)
    expected, state = families.run(model, x), torch.get_rng_state()
    tokenprune.patch(model, method)
    assert torch.equal(families.run(model, x), expected)
    assert torch.equal(torch.get_rng_state(), state)
    dropped = families.run(model.train(), x)
    assert not torch.allclose(dropped, expected, rtol=1e-2)
    assert torch.equal(families.run(model.eval(), x), expected)
    tokenprune.unpatch(model)
    assert nothing_is_left(model)
    assert torch.equal(families.run(model, x), expected)


def test_a_frozen_tower_in_eval_mode_rests_inside_a_model_that_trains() -> None:
    model: Any = families.build("class_token")
    x = families.images(model)
    expected = families.run(model, x)
    tokenprune.patch(model, "flip")
    model.train()
    model.blocks.eval()
    assert torch.equal(families.run(model, x), expected)


def test_a_later_block_in_eval_mode_follows() -> None:
    model: Any = families.build("rotary_registers")
    tokenprune.patch(model, "flip", keep=0.4)
    x = families.images(model)
    expected = trained(model, x)[0]
    model.train()
    model.blocks[2].eval()
    torch.manual_seed(7)
    assert torch.equal(families.run(model, x), expected)


def test_what_is_drawn_is_torchs_own_and_every_step_another() -> None:
    model = families.build("class_token")
    tokenprune.patch(model, "flip")
    x = families.images(model)
    first, again, other = trained(model, x, 7)[2], trained(model, x, 7)[2], trained(model, x, 8)[2]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with tokenprune.record(model) as recording:
        model(x), model(x)
    one, two = (forward.places[0].kept for forward in recording.forwards)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_patches_and_draws_the_same(reentrant: bool) -> None:
    model: Any = families.build("class_token")
    tokenprune.patch(model, "flip", keep=0.4)
    for block in model.blocks:
        block.attn.proj_drop.p = block.mlp.drop1.p = 0.3
    x = families.images(model).requires_grad_()  # re-entrant checkpoints need an input with gradients
    expected = trained(model, x)
    blocks, model.blocks = model.blocks, nn.Sequential(*(Checkpointed(block, reentrant) for block in model.blocks))
    found = trained(model, x)
    model.blocks = blocks
    assert torch.equal(found[0], expected[0])
    assert_all_close(found[1], expected[1])


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant)
        return out


def test_checkpointing_that_forgets_the_generator_drops_the_same_patches() -> None:
    model: Any = families.build("class_token")
    tokenprune.patch(model, "flip", keep=0.4)
    x = families.images(model)
    expected = trained(model, x)
    run = torch.utils.checkpoint.checkpoint
    torch.manual_seed(7)
    model.train().zero_grad(set_to_none=True)
    tokens = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        tokens = run(block, tokens, use_reentrant=False, preserve_rng_state=False)
    out = model.forward_head(model.norm(tokens))
    assert torch.equal(out.detach(), expected[0])
    (out * torch.linspace(-1, 1, out.shape[-1])).square().sum().backward()
    assert_all_close([p.grad for p in model.parameters()], expected[1])


@pytest.mark.parametrize("name", full_but(("clip_model",), ("clip_model", "siglip_model")))
def test_image_text_models(name: str) -> None:
    model: Any = hf_families.build(name)
    _, _, prefix = hf_families.MODELS[name]
    x, ids = hf_families.images(3), torch.arange(3 * 7).reshape(3, 7)
    expected = hf_families.call(model, x)
    tokenprune.patch(model, "flip", keep=0.5)
    assert torch.equal(hf_families.call(model, x).logits_per_image, expected.logits_per_image)
    model.train()
    with tokenprune.record(model) as recording:
        out = model(pixel_values=x, input_ids=ids, return_loss=True)
    out.loss.backward()
    kept = recording.forwards[0].places[0].kept
    gradients = [p.grad for p in model.parameters()]
    hidden_states = out.vision_model_output.last_hidden_state
    assert kept.shape == (3, 18)
    assert hidden_states.shape == (3, prefix + 36, hf_families.WIDTH)
    tokenprune.unpatch(model)
    assert nothing_is_left(model)
    if name == "siglip_model":  # its head pools all tokens, of which a dropped one is its nearest neighbour
        return
    seen = torch.zeros(3, prefix + 36, dtype=torch.bool)
    seen[:, :prefix] = True
    seen.scatter_(1, kept + prefix, True)
    model.zero_grad(set_to_none=True)
    with hidden(seen):
        alone = model(pixel_values=x, input_ids=ids, return_loss=True)
    alone.loss.backward()
    torch.testing.assert_close(out.logits_per_image, alone.logits_per_image, rtol=1e-4, atol=1e-4)
    assert_all_close(gradients, [p.grad for p in model.parameters()])


def test_the_report_counts_the_training_forward_and_says_so() -> None:
    model = families.build("class_token")
    tokenprune.patch(model, "flip", keep=0.5)
    data = tokenprune.report(model).to_dict()
    assert data["places"] == [{"name": "blocks.0", "tokens_in": 35, "tokens_out": 18}]
    assert any("training forwards alone" in note for note in data["notes"])
    tokens, shorter, width = 36, 19, 96
    block = [n * width * (4 + 8) * width + 2 * n * n * width for n in (tokens, shorter)]
    around = data["flops_before"] - 4 * block[0]
    assert data["flops_after"] == around + 4 * block[1]


@pytest.mark.parametrize("flops", [0.3, 0.6])
def test_a_flops_budget_is_that_of_a_training_forward(flops: float) -> None:
    model = families.build("class_token")
    tokenprune.patch(model, "flip", flops=flops)
    assert abs(tokenprune.report(model).to_dict()["flops_ratio"] - flops) < 0.02  # a token of 35 is 0.03


def test_a_copy_and_a_pickle_train_as_the_model_does() -> None:
    model = families.build("class_token")
    tokenprune.patch(model, "flip")
    x = families.images(model)
    expected = trained(model, x)
    model.zero_grad(set_to_none=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        found = trained(other, x)
        assert torch.equal(found[0], expected[0])
        assert_all_close(found[1], expected[1])


def test_it_compiles_into_one_graph() -> None:
    model = families.build("class_token").train()
    tokenprune.patch(model, "flip")
    x = families.images(model)
    torch.manual_seed(3)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(("method", "what"), [("flip", "first_block"), ("noise_mask", "first_block")])
def test_other_families_refuse(method: str, what: str) -> None:
    from tokenprune.evals.family_models import IMAGE_FAMILIES, OTHER_FAMILIES

    for name in ("Swin", "DiT"):
        _, target, _ = next(f for f in (*IMAGE_FAMILIES, *OTHER_FAMILIES) if f.name == name).make()
        with pytest.raises(tokenprune.UnsupportedMethod, match=what):
            tokenprune.patch(target, method)


def test_options_that_mean_nothing_are_refused() -> None:
    model = families.build("class_token")
    for options in ({"color": "pink"}, {"sigma": 0.0}, {"sigma": True}):
        with pytest.raises(tokenprune.UnsupportedMethod, match=r"for example|none of"):
            tokenprune.patch(model, "noise_mask", **options)
    with pytest.raises(tokenprune.BudgetError):
        tokenprune.patch(model, "flip", rate=0.0)
