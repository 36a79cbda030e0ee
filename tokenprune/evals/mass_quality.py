"""What fewer iterations and fewer queries do to the importance that Zero-TPrune reads off a really trained model.

    python -m tokenprune.evals.mass_quality

Photographs through DINOv2 ViT-S/14 (`tokenprune.evals.dinov2`), 257 tokens, every block. The importance of a patch is
the PageRank from the weighted start, heads filtered and fused as in `zero_tprune`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.evals.table import Row, Table, environment
from tokenprune.method import Method
from tokenprune.registry import make_method, register_method
from tokenprune.scores.pagerank import fuse_heads, passing_heads, start_mass, weighted_pagerank
from tokenprune.scores.probes import probed_mass

MOST = 100
COUNTS = (1, 5, 30)
TOLERANCES = (1e-1, 1e-2, 1e-3)
WINDOWS = ((2, 2), (4, 4))
PARTS = {"blocks 0 to 2": range(3), "blocks 3 to 8": range(3, 9), "blocks 9 to 11": range(9, 12)}
_RECORDS: list[AttentionRecord] = []


def _keep_record(record: AttentionRecord) -> Tensor:
    _RECORDS.append(record)
    return torch.zeros_like(record.origin, dtype=torch.float32)


@register_method("seen")
def seen() -> Method:
    """Keeps every token, and what the method was shown."""
    return replace(make_method("top_k", {}), name="seen", score=_keep_record)


def records(model: nn.Module, images: Tensor) -> list[AttentionRecord]:
    """What every block of the unreduced `model` shows of images [B, C, H, W]."""
    depth = len(model.blocks)  # type: ignore[arg-type]
    with torch.no_grad(), tokenprune.patched(model, "seen", schedule=dict.fromkeys(range(depth), 1.0)):
        _RECORDS.clear()
        model(images)
    found = list(_RECORDS)
    _RECORDS.clear()
    return found


def overlap(scores: Tensor, exact: Tensor, share: float = 0.5) -> float:
    """Share of the patches kept by `exact` [B, n] that `scores` keep too, where `share` of all are kept."""
    keep = round(share * exact.shape[1])
    both = (_kept(scores, keep) & _kept(exact, keep)).sum()
    return float(both) / (keep * exact.shape[0])


def rank_correlation(scores: Tensor, exact: Tensor) -> float:
    """Spearman's, of each image [B, n] without ties, in the mean."""
    ranks = [x.argsort(1).argsort(1).double() for x in (scores, exact)]
    ranks = [x - x.mean(1, keepdim=True) for x in ranks]
    return float((ranks[0] * ranks[1]).sum(1).div(ranks[0].square().sum(1)).mean())


def iterations_table(shown: list[AttentionRecord]) -> Table:
    """Kept sets after some iterations, and at some tolerances, against MOST iterations, by depth.

    Columns: `kept_alike` (share of the kept half in common), `rank_correlation`, `iterations` (mean over heads).
    """
    rows: list[Row] = []
    for part, blocks in PARTS.items():
        found: dict[str, list[Mapping[str, float]]] = {}
        for block in blocks:
            for name, cells in _settling(shown[block]):
                found.setdefault(name, []).append(cells)
        rows += [{"depth": part, "iterations=": name, **_means(cells)} for name, cells in found.items()]
    return Table(rows, environment())


def probes_table(shown: list[AttentionRecord]) -> Table:
    """Kept sets by pooled and sampled queries against all queries, by iterations and depth; columns as above."""
    rows: list[Row] = []
    for iterations in COUNTS:
        whole = [_importance(record, weighted_pagerank(record, iterations)) for record in shown]
        for window in WINDOWS:
            for how in ("pool", "sample"):
                for part, blocks in PARTS.items():
                    cells = []
                    for record, exact in ((shown[block], whole[block]) for block in blocks):
                        mass = probed_mass(
                            record,
                            start_mass(record),
                            window=window,
                            how=how,
                            iterations=iterations,
                        )
                        cells.append(_against(_importance(record, mass), exact))
                    name = f"{how} {window[0]}x{window[1]}"
                    rows.append({"iterations": iterations, "queries": name, "depth": part, **_means(cells)})
    return Table(rows, environment())


def _settling(record: AttentionRecord) -> Iterator[tuple[str, Mapping[str, float]]]:
    every = weighted_pagerank(record, tuple(range(1, MOST + 1)))
    exact = _importance(record, every[-1])
    for count in COUNTS:
        yield str(count), {**_against(_importance(record, every[count - 1]), exact), "iterations": count}
    for tolerance in TOLERANCES:
        settled = _importance(record, weighted_pagerank(record, tolerance))
        change = (every - torch.cat([start_mass(record)[None], every[:-1]])).abs().sum(-1)
        needed = 1 + (change >= tolerance).long().cumprod(0).sum(0).double()
        yield str(tolerance), {**_against(settled, exact), "iterations": float(needed.mean())}


def _importance(record: AttentionRecord, mass: Tensor) -> Tensor:
    scores = mass[:, :, record.num_prefix_tokens :]
    return fuse_heads(scores, passing_heads(scores, (0.01, 0.7)))


def _against(scores: Tensor, exact: Tensor) -> dict[str, float]:
    return {"kept_alike": overlap(scores, exact), "rank_correlation": rank_correlation(scores, exact)}


def _kept(scores: Tensor, keep: int) -> Tensor:
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)


def _means(cells: Sequence[Mapping[str, float]]) -> Row:
    return {name: sum(cell[name] for cell in cells) / len(cells) for name in cells[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what fewer iterations do to the importance, and what fewer queries do."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.mass_quality", description=main.__doc__)
    parser.add_argument("--images", type=int, help="photographs (default: all of them)")
    options = parser.parse_args(arguments)
    from tokenprune.evals.dinov2 import dinov2_small, normalize
    from tokenprune.evals.images import photographs

    maps = records(dinov2_small(), normalize(photographs().images[: options.images]))
    print(iterations_table(maps).to_markdown())
    print(probes_table(maps).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
