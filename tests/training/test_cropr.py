"""Token Cropr: scores, auxiliary losses and last-layer fusion against loops; that training and inference choose alike,
and that of what is trained a vector is left."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import naive_selectors
import naive_vit
import pytest
import timm
import tiny_models
import torch
from compared import assert_same, clear_oracle, recorded
from families import build, full_but, images, run
from learned_starts import by_place, start
from learned_thresholds import in_training, patch_of
from naive_ltmp import attend
from safetensors.torch import load_file
from torch import Tensor, nn

import tokenprune
from tokenprune import BudgetError, TokenPruneError, UnsupportedMethod
from tokenprune.learned_parts import LearnedParts
from tokenprune.learning import Shape
from tokenprune.methods.cropr import Cropr, auxiliary, curriculum, strip
from tokenprune.training import train
from tokenprune.training.state import FILE

Data = tuple[Tensor, Tensor]
SHARES = {1: 0.6, 4: 0.5, 9: 0.4}
pytestmark = [pytest.mark.filterwarnings("ignore:what was learned costs"), pytest.mark.usefixtures("short")]


class Maps(nn.Module):
    """A tower read without pooling, whose last tokens say the class of each of its 5 x 7 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = build("class_token")
        self.tower.reset_classifier(0, "")

    def forward(self, x: Tensor) -> Tensor:
        [found] = self.tower.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        logits: Tensor = found[:, :6]
        return logits


def trained(model: nn.Module, places: Mapping[int, object], labels: int, width: int) -> nn.ModuleDict:
    """Modules as in a training, with weights that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        parts = {p: Cropr(Shape(width, p, len(model.blocks), classes=5, labels=labels)) for p in places}
        for part in parts.values():
            for name, parameter in part.named_parameters():
                nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.4)
    return nn.ModuleDict({str(place): part for place, part in parts.items()})


def stripped(model: nn.Module, parts: nn.ModuleDict, **budget: object) -> LearnedParts:
    found = start(model, "cropr", **budget)
    for place, part in parts.items():
        for name, tensor in strip(part).items():
            found.tensors[f"{place}.{name}"].copy_(tensor)
    return found


@pytest.mark.parametrize("labels", [1, 35])
@pytest.mark.parametrize("variant", full_but(("class_token",), ("class_token", "registers", "rotary")))
def test_agrees_with_the_loops(variant: str, labels: int) -> None:
    model = tiny_models.build(variant)
    parts = trained(model, SHARES, labels, 48)
    learned = {int(place): {"queries": part.queries.detach().double()} for place, part in parts.items()}
    schedule = {block: naive_vit.leaving_share(share) for block, share in SHARES.items()}
    x, oracle = clear_oracle(model, lambda place: naive_selectors.cropr(place, learned), schedule, after_block=True)
    tokenprune.patch(model, weights=stripped(model, parts, schedule=SHARES), schedule=SHARES, restore="regression")
    assert_same(*recorded(model, x), oracle)


def test_all_tokens_come_back_in_front_of_the_last_block() -> None:
    """As they were when they left, whichever place that was."""
    model, x = tiny_models.build("class_token"), tiny_models.images(1)
    model.blocks = model.blocks[:5]
    shares = {0: 0.7, 2: 0.4}
    parts = stripped(model, trained(model, shares, 1, 48), schedule=shares)
    learned, own = by_place(parts), copy.deepcopy(model).double()
    rows = dict(enumerate(own._pos_embed(own.patch_embed(x.double()))[0]))
    there, kept = list(rows), []
    for index, block in enumerate(own.blocks):
        if index == 4:
            there = list(rows)
        tokens = torch.stack([rows[i] for i in there])
        tokens = tokens + attend(block.attn, block.norm1(tokens), [torch.ones(())] * len(there), [1.0] * len(there))[0]
        tokens = tokens + block.mlp(block.norm2(tokens))
        rows |= dict(zip(there, tokens, strict=True))
        if index in shares:
            scores = {i: naive_selectors.product(learned[index]["query"], rows[i]) for i in there if i > 0}
            best = sorted(scores, key=scores.__getitem__, reverse=True)
            there = [0, *sorted(best[: naive_vit.leaving_share(shares[index])(35 if index == 0 else 25)])]
            kept.append([i - 1 for i in there[1:]])
    logits = own.head(own.norm(torch.stack([rows[i] for i in there]))[:1])
    tokenprune.patch(model, weights=parts, schedule=shares)
    found, passages = recorded(model, x)
    assert [passages[0][block].kept for block in shares] == kept
    torch.testing.assert_close(found.double(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_a_training_forward_chooses_as_inference_does_and_its_loss_is_that_of_the_loops(dense: bool) -> None:
    model, x = tiny_models.build("class_token"), tiny_models.images(2)
    labels = torch.arange(70).reshape(2, 7, 5) % 5 if dense else torch.tensor([3, 1])
    parts = trained(model, SHARES, 35 if dense else 1, 48)
    tokenprune.patch(model, weights=stripped(model, parts, schedule=SHARES), schedule=SHARES)
    with torch.no_grad():
        plain = model(x)
    _, passages = recorded(model, x)
    patch = patch_of(model)
    patch.learned = parts
    with in_training(model) as lesson:
        out = model(x)
        lesson.labels, lesson.parts, lesson.grid = labels, parts, (7, 5)
        loss = auxiliary(lesson, 0.6)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    counts = [len(passages[0][block].kept) for block in SHARES]
    assert [one.shape[1] for one in lesson.entered.values()] == [36, *(1 + count for count in counts[:-1])]
    expected = 0.0
    for block, tokens in lesson.entered.items():
        tensors = {name: tensor.detach().double() for name, tensor in parts[str(block)].state_dict().items()}
        for image, label in zip(tokens.double(), labels, strict=True):
            expected = (
                expected
                + naive_selectors.auxiliary_loss(image, tensors, label.flatten().tolist() if dense else [int(label)])
                / 2
            )
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())  # which takes gradients, and gets none
    assert all(parameter.grad.abs().max() > 0 for parameter in parts.parameters())


def test_of_maps_the_number_that_leaves_rises_over_half_of_the_training() -> None:
    assert [curriculum(progress, dense=False) for progress in (0.0, 0.9)] == [1.0, 1.0]
    assert [curriculum(progress, dense=True) for progress in (0.0, 0.25, 0.5, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    model = build("class_token")
    x, shares = images(model), {0: 0.6, 1: 0.2}
    tokenprune.patch(model, weights=start(model, "cropr", schedule=shares), schedule=shares)
    for strength, counts in ((0.0, [36, 36]), (0.5, [36, 29]), (1.0, [36, 22])):
        with torch.no_grad(), in_training(model) as lesson:
            lesson.strength = strength
            model(x)
        assert [one.shape[1] for one in lesson.entered.values()] == counts


def test_a_vector_for_each_block_is_left_and_serves_every_budget(tmp_path: Path) -> None:
    deep = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, num_heads=3, num_classes=5
    )
    x, y = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 5
    before = copy.deepcopy(deep.state_dict())
    found = train(deep, (x, y), "cropr", flops=0.6, epochs=2, batch_size=8, output=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())
    assert {name: tuple(t.shape) for name, t in found.tensors.items()} == {f"{b}.query": (48,) for b in range(10)}
    assert load_file(tmp_path / "learned.safetensors").keys() == found.tensors.keys()
    state = load_file(tmp_path / FILE)
    assert torch.equal(state[".learned.3.queries"][0], found.tensors["3.query"])
    assert found.found["added_loss"] > 8  # about log 5 at each of ten places
    for flops in (0.5, 0.6, 0.9):
        tokenprune.patch(deep, "cropr", flops=flops, weights=tmp_path)
        assert tokenprune.report(deep).to_dict()["flops_ratio"] == pytest.approx(flops, abs=0.01)
    assert run(deep.eval(), x).isfinite().all()
    tokenprune.patch(deep, weights=tmp_path, r=2)
    assert [p["tokens_out"] for p in tokenprune.report(deep).to_dict()["places"]] == [61 - 2 * i for i in range(10)]


@pytest.mark.full
def test_a_killed_training_on_maps_goes_on_bit_by_bit(tmp_path: Path) -> None:
    model = Maps()
    x, y = images(model.tower, 12), torch.arange(12 * 35).reshape(12, 5, 7) % 6
    options = {"flops": 0.7, "batch_size": 4, "epochs": 3, "save_every": 4}
    whole = train(model, (x, y), "cropr", output=tmp_path / "whole", **options)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir(exist_ok=True)
    calls = []

    def die(*_: object) -> None:
        calls.append(0)
        if len(calls) == 7:
            raise KeyboardInterrupt

    handle = model.register_forward_hook(die)
    with pytest.raises(KeyboardInterrupt):
        train(model, (x, y), "cropr", output=tmp_path / "killed", **options)
    handle.remove()
    resumed = train(model, (x, y), "cropr", output=tmp_path / "killed", **options)
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_maps_of_labels(tmp_path: Path) -> None:
    model = Maps()
    x, y = images(model.tower, 8), torch.arange(8 * 35).reshape(8, 5, 7) % 6
    found = train(model, (x, y), "cropr", flops=0.7, batch_size=4, epochs=2, output=tmp_path)
    assert all(tensor.shape == (96,) for tensor in found.tensors.values())
    assert load_file(tmp_path / FILE)[".learned.0.queries"].shape == (35, 96)
    tokenprune.patch(model, weights=tmp_path, flops=0.7)
    assert run(model, x).shape == (8, 6, 5, 7)
    for wrong, told in (
        (y[:, :4], r"no logits but \[4, 6, 5, 7\], and \[B, classes, 4, 7\]"),
        (y[:, 0, 0], "no logits"),
    ):
        with pytest.raises(TokenPruneError, match=told):
            train(model, (x, wrong), "cropr", flops=0.7, batch_size=4, epochs=1)
    with pytest.raises(TokenPruneError, match="labels from 0 to 9, and the model has 6 classes"):
        train(model, (x, y % 2 * 9), "cropr", flops=0.7, batch_size=4, epochs=1)


@pytest.mark.parametrize("family", full_but(("class_token",), ("class_token", "talking_heads", "mean_pool", "rotary")))
def test_families(family: str) -> None:
    model = build(family)
    x, width = images(model), model.embed_dim
    places = {0: 0.7, 1: 0.5}
    tokenprune.patch(model, weights=stripped(model, trained(model, places, 1, width), schedule=places), schedule=places)
    assert run(model, x).isfinite().all()
    assert model.forward_features(x).shape[1] == tokenprune.unpatch(model).forward_features(x).shape[1]


def test_where_it_is_refused(model: nn.Module, data: Data) -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(2, 2)).eval()
    with pytest.raises(UnsupportedMethod, match="learns for the blocks of an image tower, not within windows"):
        tokenprune.patch(swin, "cropr", keep=0.5)
    with pytest.raises(BudgetError, match="leaves nothing out, and cropr has nothing to learn"):
        train(model, data, "cropr", flops=1.0)
    with pytest.raises(UnsupportedMethod, match=r"cropr has to learn .* tokenprune train MODEL --method cropr"):
        tokenprune.patch(model, "cropr", flops=0.6)
    with pytest.raises(BudgetError, match=r"r=40 cannot be removed behind 2 blocks: 35 tokens .* use r=15"):
        tokenprune.patch(model, weights=start(model, "cropr", flops=0.8), r=40)
