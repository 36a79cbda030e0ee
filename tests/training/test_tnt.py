"""TNT: what it keeps and the noise of its training against loops, and that one training serves every budget."""

from __future__ import annotations

import copy
from pathlib import Path

import naive_selectors
import naive_vit
import pytest
import timm
import tiny_models
import torch
from compared import assert_same, clear_oracle, recorded
from families import build, full_but, images, run
from learned_starts import by_place, random_parts
from learned_thresholds import in_training
from naive_ltmp import attend
from torch.nn import functional as F

import tokenprune
from tokenprune import TokenPruneError, UnsupportedMethod
from tokenprune.attention_record import AttentionRecord
from tokenprune.learned_parts import load_learned
from tokenprune.methods.tnt import nothing_leaves
from tokenprune.scores.fixed import hashed_scores
from tokenprune.training import train

SHARES = {1: 0.6, 4: 0.5, 9: 0.4}
pytestmark = [pytest.mark.filterwarnings("ignore:what was learned costs"), pytest.mark.usefixtures("short")]


def candidates(block: int, patches: list[int]) -> list[int]:
    """Positions of the half that the package draws among these patches."""
    origin = torch.tensor(patches)[None]
    record = AttentionRecord(origin[..., None].float(), origin, 0, block, 12, None)
    order = hashed_scores(record, 0)[0].argsort(descending=True, stable=True).tolist()
    return sorted(order[len(order) - len(order) // 2 :])


@pytest.mark.parametrize("variant", full_but(("class_token", "rotary"), ("class_token", "registers", "rotary")))
@pytest.mark.parametrize("similarity", [0.0, 0.32])
def test_agrees_with_the_loops(variant: str, similarity: float) -> None:
    model = tiny_models.build(variant)
    parts = random_parts(model, "tnt", schedule=SHARES)
    schedule = {block: naive_vit.leaving_share(share) for block, share in SHARES.items()}

    def reduce(place: naive_vit.Place) -> list[naive_vit.Token]:
        alike = round(similarity * (len(place.tokens) - place.keep))
        return naive_selectors.tnt(place, by_place(parts), alike, candidates)

    x, oracle = clear_oracle(model, reduce, schedule, after_block=True)
    tokenprune.patch(model, weights=parts, schedule=SHARES, similarity=similarity)
    assert_same(*recorded(model, x), oracle)


def test_the_noise_of_a_training_and_its_gradients_are_those_of_the_loops() -> None:
    model, x, label = tiny_models.build("class_token"), tiny_models.images(1), torch.tensor([3])
    model.blocks = model.blocks[:4]
    parts = random_parts(model, "tnt", schedule={0: 1.0, 1: 1.0})
    weights = {block: part["weight"].requires_grad_(True) for block, part in by_place(parts).items()}
    own = copy.deepcopy(model).double()
    torch.manual_seed(5)
    drawn = [torch.randn(1, 35, 48)[0].double() for _ in weights]
    tokens = own._pos_embed(own.patch_embed(x.double()))[0]
    for index, block in enumerate(own.blocks):
        out = attend(block.attn, block.norm1(tokens), [torch.ones(())] * 36, [1.0] * 36)[0]
        tokens = tokens + out
        tokens = tokens + block.mlp(block.norm2(tokens))
        if index in weights:
            tokens = naive_selectors.noisy(tokens, 1, weights[index], drawn[index], noise=0.4)
    logits = own.head(own.norm(tokens)[:1])
    wanted = torch.autograd.grad(F.cross_entropy(logits, label), list(weights.values()))
    tokenprune.patch(model, "tnt", weights=parts, schedule={0: 1.0, 1: 1.0}, noise=0.4)
    learned = tokenprune.learned(model).requires_grad_(True)
    model.requires_grad_(False)
    with in_training(model) as lesson:
        lesson.strength = nothing_leaves(0.5, dense=False)
        torch.manual_seed(5)
        out = model(x)
    assert all(one.shape == (1, 36, 48) for one in lesson.entered.values())
    torch.testing.assert_close(out.double(), logits, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(F.cross_entropy(out, label), list(learned.parameters()))
    for got, one in zip(found, wanted, strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(got.double(), one, rtol=1e-3, atol=1e-3 * one.abs().max().item())


def test_one_training_is_for_every_budget_and_place(tmp_path: Path) -> None:
    deep = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, num_heads=3, num_classes=5
    )
    x, y = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 5
    state, before = torch.get_rng_state(), copy.deepcopy(deep.state_dict())
    found = train(deep, (x, y), "tnt", flops=0.6, epochs=2, batch_size=8, noise=0.5, output=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())
    assert sorted(found.tensors) == [f"{block}.weight" for block in range(5)]
    assert all(tensor.abs().max() > 0 for tensor in found.tensors.values())
    assert found.found["kept"] == 1.0
    assert found.found["flops_ratio"] == pytest.approx(0.6, abs=0.01)
    for flops in (0.5, 0.6, 0.9):
        tokenprune.patch(deep, "tnt", flops=flops, weights=tmp_path)
        told = tokenprune.report(deep).to_dict()
        assert told["flops_ratio"] == pytest.approx(flops, abs=0.01)
        assert [place["name"] for place in told["places"]] == ["blocks.2", "blocks.3", "blocks.4"]
    tokenprune.patch(deep, "tnt", weights=tmp_path, places=(2,), rate=0.6)
    assert tokenprune.report(deep).to_dict()["places"][0]["tokens_out"] == 39
    with pytest.raises(TokenPruneError, match="do not fit tnt in the blocks 7"):
        tokenprune.patch(deep, "tnt", weights=tmp_path, places=(7,))
    tokenprune.patch(deep, weights=load_learned(tmp_path), flops=0.6)
    assert torch.equal(run(deep.train(), x), run(deep.eval(), x))  # the trainer alone adds noise
    assert train(deep, (x, y), "tnt", flops=0.6, epochs=1, batch_size=8, places=(3,)).tensors.keys() == {"3.weight"}


@pytest.mark.parametrize("family", full_but(("class_token",), ("class_token", "talking_heads", "mean_pool", "hybrid")))
def test_families(family: str) -> None:
    model = build(family)
    x, parts = images(model), random_parts(model, "tnt", flops=0.8)
    tokenprune.patch(model, weights=parts, flops=0.8)
    assert run(model, x).isfinite().all()
    assert tokenprune.report(model).to_dict()["flops_ratio"] == pytest.approx(0.8, abs=0.02)


def test_where_it_is_refused() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(2, 2)).eval()
    with pytest.raises(UnsupportedMethod, match="learns for the blocks of an image tower, not within windows"):
        tokenprune.patch(swin, "tnt", keep=0.5)
    for wrong in (-0.1, 1.5, "half"):
        with pytest.raises(UnsupportedMethod, match="similarity of tnt is a share"):
            tokenprune.patch(build("class_token"), "tnt", similarity=wrong)
    for wrong in (-1.0, 0.0, float("nan")):
        with pytest.raises(UnsupportedMethod, match="noise of tnt is a positive number"):
            tokenprune.patch(build("class_token"), "tnt", noise=wrong)
