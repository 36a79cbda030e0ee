"""sparsevit's random shares in training: drawn anew in each step, as published, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from naive_windows import run_swin
from windows_zoo import SIZES, build, images

import tokenprune
from tokenprune.errors import BudgetError, UnsupportedModel
from tokenprune.methods.sparsevit import drawn_ratios

torch.set_num_threads(1)


def computed(model: torch.nn.Module) -> dict[str, int]:
    places = tokenprune.report(model).to_dict()["places"]
    return {place["name"]: place["windows_out"] for place in places}


def test_a_step_is_that_of_the_loops_with_the_shares_that_were_drawn() -> None:
    model, x = build("v1", SIZES[1]).double(), images(SIZES[1]).double()
    tokenprune.patch(model, "sparsevit", adapt=0.8)
    model.train()
    torch.manual_seed(5)
    drawn = [torch.randint(9, (1,)).item(), *sorted(torch.randint(9, (2,)).tolist())]
    torch.manual_seed(5)
    got = model(x)
    ratios = ([drawn[0] / 10] * 2, [drawn[1] / 10] * 2 + [drawn[2] / 10] * 2)
    assert len(set(drawn)) == 3
    expected = run_swin(model, x, ratios)[0]
    torch.testing.assert_close(got.detach(), expected, rtol=1e-9, atol=1e-9)
    got.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.layers[0].parameters())


def test_all_shares_are_drawn_and_rise_within_a_stage() -> None:
    model, x = build(), images()
    tokenprune.patch(model, "sparsevit", adapt=0.5).train()
    first, later = set(), set()
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(36):
            model(x)
            found = computed(model)
            first.add(found.get("layers.0.blocks.0", 36))
            pairs = [found.get(f"layers.1.blocks.{b}", 9) for b in range(4)]
            later.add((pairs[0], pairs[2]))
            assert pairs[0] == pairs[1] >= pairs[2] == pairs[3]
    assert first == {36, 32, 28, 25, 21, 18}
    assert len(later) > 6


def test_no_step_leaves_out_more_than_was_asked_for() -> None:
    torch.manual_seed(0)
    for most, largest in ((0.96, 0.9), (0.3, 0.3), (0.7, 0.7), (0.15, 0.1)):
        drawn = [ratio for _ in range(60) for ratio in drawn_ratios((2, 4), most)]
        assert max(drawn) == pytest.approx(largest)


def test_in_eval_mode_nothing_is_left_out() -> None:
    model, x = build(), images()
    with torch.no_grad():
        plain = model(x)
        tokenprune.patch(model, "sparsevit", adapt=0.8)
        before = torch.get_rng_state()
        assert torch.equal(model(x), plain)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(model.train()(x), plain)
        assert "training forwards alone" in str(tokenprune.report(model))
        assert torch.equal(tokenprune.unpatch(model.eval())(x), plain)


def test_refusals() -> None:
    model = build()
    for options in ({"adapt": 0.04}, {"adapt": 0.09}, {"adapt": 1.0}, {"adapt": 0.8, "ratios": (0.5, 0.5)}):
        with pytest.raises(BudgetError, match=r"adapt=0\.8"):
            tokenprune.patch(model, "sparsevit", **options)
    with pytest.raises(BudgetError, match="draws the shares"):
        tokenprune.patch(model, "sparsevit", adapt=0.8, flops=0.5)
    tokenprune.patch(model, "sparsevit", adapt=0.8).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises((UnsupportedModel, torch._dynamo.exc.Unsupported), match="other numbers of windows"):
        compiled(images())
