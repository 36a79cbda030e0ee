"""Report: what a patch does to a model, in words and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.family import AppliedPatch


@dataclass(frozen=True)
class Report:
    """Live view of one patch; multiply-adds are those of one image: of an image tower at the size of the last forward
    (of an adaptive method the mean over its images), of a denoiser a forward's mean over the run, of a vision-language
    model the last prefill of a prompt."""

    patch: AppliedPatch

    def to_dict(self) -> dict[str, Any]:
        """method, budget, flops_before and flops_after (multiply-adds of one image; 1 of them = 2 FLOPs),
        flops_ratio, places (name, tokens_in, tokens_out; of an adaptive method means, with the fewest and the most
        that left an image; of a denoiser with the steps of the run), skipped {place: why}, speed
        (what the latency table of this device says), chosen (where no method was named: why this one); of an image
        tower restore, as in `patch`."""
        return {**self.patch.summary(), "speed": self.patch.speed, "chosen": self.patch.chosen}

    def __str__(self) -> str:
        data = self.to_dict()
        lines = [f"{data['method']} ({data['paper']}) on {data['family']}, {data['budget']}"]
        if data["flops_before"]:
            lines.append(
                f"{data['flops_before'] / 1e9:.3f} -> {data['flops_after'] / 1e9:.3f} G multiply-adds an image"
                f" ({data['flops_ratio']:.3f})"
            )
        width = max([12, *(len(p["name"]) + 2 for p in data["places"])])
        lines.append(f"{'place':<{width}}{'tokens in':>10}{'tokens out':>12}")
        lines += [
            f"{p['name']:<{width}}{p['tokens_in']:>10}{p['tokens_out']:>12}"
            + (f"  {p['steps']}" if "steps" in p else "")
            for p in data["places"]
        ]
        lines += [f"{name}: {why}" for name, why in data["skipped"].items()]
        lines += [*data["notes"], *filter(None, [data["chosen"]]), data["speed"]]
        return "\n".join(lines)
