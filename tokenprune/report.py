"""Report: what a patch does to a model, in words and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.patch import Patch


@dataclass(frozen=True)
class Report:
    """Live view of one patch; multiply-adds are those of one image at the size of the last forward."""

    patch: Patch

    def to_dict(self) -> dict[str, Any]:
        """method, budget, flops_before and flops_after (multiply-adds of one image; 1 of them = 2 FLOPs),
        flops_ratio, places (name, tokens_in, tokens_out), skipped {place: why}."""
        patch = self.patch
        tokens = patch.entered
        counts = patch.counts(tokens) if patch.active else {}
        assert patch.costs is not None
        before = patch.costs.total(tokens)
        after: float = patch.costs.total(tokens, counts)
        if patch.counted is not None and tokens == patch.tokens:
            after = patch.counted  # of the very forward, not of the model of its cost
        return {
            "method": patch.method.name,
            "paper": patch.method.paper,
            "family": patch.adapter,
            "budget": str(patch.budget),
            "tokens": tokens,
            "num_prefix_tokens": patch.num_prefix_tokens,
            "flops_before": round(before),
            "flops_after": round(after),
            "flops_ratio": after / before,
            "places": [
                {"name": name, "tokens_in": tokens_in, "tokens_out": tokens_out}
                for name, tokens_in, tokens_out in _places(patch, counts)
            ],
            "skipped": dict(patch.skipped),
            "notes": list(patch.notes),
        }

    def __str__(self) -> str:
        data = self.to_dict()
        lines = [
            f"{data['method']} ({data['paper']}) on {data['family']}, {data['budget']}",
            f"{data['flops_before'] / 1e9:.3f} -> {data['flops_after'] / 1e9:.3f} G multiply-adds an image"
            f" ({data['flops_ratio']:.3f})",
            f"{'place':<12}{'tokens in':>10}{'tokens out':>12}",
        ]
        lines += [f"{p['name']:<12}{p['tokens_in']:>10}{p['tokens_out']:>12}" for p in data["places"]]
        lines += [f"{name}: {why}" for name, why in data["skipped"].items()]
        lines += data["notes"]
        return "\n".join(lines)


def _places(patch: Patch, counts: dict[int, int]) -> list[tuple[str, int, int]]:
    """(name, tokens in, tokens out) of each place at the size of the last forward."""
    places, tokens = [], patch.entered
    for index in sorted(counts):
        places.append((patch.names[index], tokens, counts[index]))
        tokens = counts[index]
    return places
