"""K-medoids and density peaks against oracles written from the definitions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import naive_clusters
import naive_vit
import pytest
import tiny_models
import torch
from compared import assert_same, clear_oracle, recorded
from constructed import constructed_place, same_rows

import tokenprune
from tokenprune.methods.dpc_knn import merge_around_peaks
from tokenprune.selection.clusters import density_peaks, medoids, merge_clusters

SHARES = {1: 0.6, 5: 0.5, 9: 0.4}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, bool]]] = {
    "k_medoids": (naive_clusters.k_medoids, {}, {}),
    "dpc_knn": (naive_clusters.dpc_knn, {}, {"weighted_pool": True}),
}
FAST = ("class_token", "mean_pool_registers")
VARIANTS = [
    pytest.param(variant, marks=[] if variant in FAST else pytest.mark.full) for variant in tiny_models.VARIANTS
]


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(method: str, variant: str) -> None:
    reduce, options, run = CASES[method]
    model = tiny_models.build(variant)
    schedule = {block: naive_vit.leaving_share(share) for block, share in SHARES.items()}
    x, oracle = clear_oracle(model, reduce, schedule, after_block=True, **run)
    tokenprune.patch(model, method, schedule=SHARES, **options)
    assert_same(*recorded(model, x), oracle)


def test_normalized_peaks_have_no_unit() -> None:
    """As published no token of large hidden states is dense, so the first tokens are the peaks."""
    x = torch.randn(2, 31, 12, generator=torch.Generator().manual_seed(3))

    def kept(scale: float, normalize: bool) -> list[list[int]]:
        record: Any = SimpleNamespace(hidden=scale * x, num_prefix_tokens=1)
        return merge_around_peaks(None, record, 9, neighbours=5, normalize=normalize).kept.tolist()

    assert kept(40.0, True) == kept(1.0, True) == kept(0.1, True)
    assert kept(40.0, False) == [list(range(9))] * 2 != kept(1.0, False)
    layer_normed = torch.nn.functional.layer_norm(x[:, 1:], (12,))
    assert kept(1.0, True) == density_peaks(layer_normed, 9, 5).tolist()


@pytest.mark.parametrize("count", [3, 7])
def test_every_iteration_and_neighbour_is_that_of_the_oracle(count: int) -> None:
    """On a line, where clusters are: the tokens of a random model are all about as far from each other."""
    generator = torch.Generator().manual_seed(5)
    moved, differ = [0, 0, 0], 0
    for _ in range(20):
        hidden = (torch.randint(0, 4, (23,), generator=generator) + 0.4 * torch.randn(23, generator=generator)).double()
        weights = torch.rand(23, generator=generator).double()
        place = constructed_place(count, attention=[same_rows(weights.tolist())], hidden=hidden.tolist())
        x, kept = hidden.view(1, -1, 1), []
        for iterations in range(4):
            kept.append(medoids(x, weights[None], count, iterations)[0].tolist())
            oracle = naive_clusters.k_medoids(place, iterations=iterations)
            assert kept[-1] == [token.representative for token in oracle]
        moved = [many + (one != other) for many, one, other in zip(moved, kept, kept[1:], strict=False)]
        peaks = []
        for neighbours in (2, 5):
            reduction = merge_clusters(x, density_peaks(x, count, neighbours))
            oracle = naive_clusters.dpc_knn(place, neighbours=neighbours)
            torch.testing.assert_close(reduction(x)[0], torch.stack([token.hidden for token in oracle]))
            peaks.append(reduction.kept)
        differ += not torch.equal(*peaks)
    assert min(moved) > 0
    assert differ > 3


@pytest.mark.parametrize("method", CASES)
def test_blocks_three_six_and_nine_see_fewer_tokens(method: str) -> None:
    """ "Which Tokens to Use?" clusters in front of these."""
    model, seen = tiny_models.build("class_token"), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1] - 1))
    tokenprune.patch(model, method, rate=0.5)
    recorded(model, tiny_models.images())
    assert seen == 3 * [35] + 3 * [18] + 3 * [9] + 3 * [5]


@pytest.mark.parametrize("method", CASES)
def test_equal_tokens_and_images_of_nan(method: str) -> None:
    """An image of one colour has nothing but equal tokens; it and one of NaN do not spoil another."""
    model = tiny_models.build("class_token")
    with torch.no_grad():
        model.pos_embed.zero_()
    tokenprune.patch(model, method, schedule={1: 0.5})
    good = tiny_models.images(1)
    _, alone = recorded(model, good)
    logits, passages = recorded(model, torch.cat([good, torch.zeros_like(good), torch.full_like(good, torch.nan)]))
    assert passages[0] == alone[0]
    assert len(set(passages[1][1].kept)) == 18
    assert logits[:2].isfinite().all()
    assert logits[2].isnan().all()


def test_options_are_checked() -> None:
    with pytest.raises(tokenprune.BudgetError, match="iterations must be a whole number"):
        tokenprune.patch(tiny_models.build("class_token"), "k_medoids", iterations=-1)
    with pytest.raises(tokenprune.BudgetError, match="neighbours must be a whole number"):
        tokenprune.patch(tiny_models.build("class_token"), "dpc_knn", neighbours=0)
