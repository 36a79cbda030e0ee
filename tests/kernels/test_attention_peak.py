"""The attention peak against the full maps."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import attention_inputs
from torch.utils.flop_counter import FlopCounterMode

from tokenprune import TokenPruneError
from tokenprune.kernels import inputs
from tokenprune.kernels.attention_peak import attention_peak
from tokenprune.kernels.attention_peak.reference import attention_peak as naive

BATCH, HEADS, TOKENS, DIM = 3, 4, 19, 8
BIASES = {"none": None, "keys": (BATCH, 1, 1, TOKENS), "pairs": (1, HEADS, TOKENS, TOKENS)}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("cached", [1, 2**10, 2**21])
def test_as_of_the_full_map(bias: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CACHED", cached)
    q, k, _ = (x.double() for x in attention_inputs(BATCH, HEADS, TOKENS, DIM))
    shape = BIASES[bias]
    added = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    for first in (0, 2):
        torch.testing.assert_close(
            attention_peak(q, k, first=first, bias=added), naive(q, k, first=first, bias=added), rtol=1e-9, atol=1e-9
        )


def test_a_graph_an_export_and_what_it_costs() -> None:
    q, k, _ = attention_inputs(BATCH, HEADS, TOKENS, DIM)
    expected = attention_peak(q, k, first=1)

    class Peak(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return attention_peak(q, k, first=1)

    torch.testing.assert_close(torch.compile(Peak(), backend="aot_eager", fullgraph=True)(q, k), expected)
    exported = torch.export.export(Peak(), (q, k))
    assert not any("tokenprune" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(q, k), expected)
    with FlopCounterMode(display=False) as counter:
        attention_peak(q, k, first=1)
    assert counter.get_total_flops() == 2 * BATCH * HEADS * (TOKENS - 1) * TOKENS * DIM
    assert attention_peak(q[:0], k[:0]).shape == (0, TOKENS)
    assert attention_peak(q.bfloat16(), k.bfloat16()).dtype == torch.float32


def test_nan_stays_in_its_image_and_what_is_refused() -> None:
    q, k, _ = attention_inputs(BATCH, HEADS, TOKENS, DIM)
    q, clean = q.clone(), attention_peak(q, k)
    q[1, 0, 3, 0] = float("nan")
    broken = attention_peak(q, k)
    assert broken[1].isnan().all()
    assert torch.equal(broken[[0, 2]], clean[[0, 2]])
    for wrong in ((q, k[:, :2], 0), (q, k, TOKENS), (q[0], k[0], 0)):
        with pytest.raises(TokenPruneError, match="do not fit"):
            attention_peak(wrong[0], wrong[1], first=wrong[2])
