"""NarrowPatch: one method on the MLPs of one model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenprune.family import Portable, Request
from tokenprune.latency import LatencyTable
from tokenprune.method import Method
from tokenprune.narrow.costs import Counted, Probe
from tokenprune.narrow.host import NarrowHost
from tokenprune.narrow.site import NarrowSite, here
from tokenprune.recording import Forward, Recording
from tokenprune.state import in_backward

_SPANS = (
    "attention is computed in full, the MLP of a block on the tokens out, and behind it all tokens are back",
    "multiply-adds are those of the usual input; a block whose windows hold padding at another size is whole there",
)


class NarrowPatch(Portable):
    """What a patch knows for as long as it is on: plain data and the sites, no module.

    keep: {block: tokens of each window that its MLP runs on, of an adaptive method the most}, without those that are
    left alone. grid: the first one of the usual input. left: {block: tokens of an image in the last forward} of an
    adaptive method, the mean over its images.
    """

    def __init__(self, host: NarrowHost, adapter: str, method: Method, request: Request) -> None:
        self.adapter = adapter
        self.method = method
        self.budget = request.budget
        self.active = not request.budget.is_full
        self.depth = host.depth
        self.grid = host.grid
        self.image = host.image
        self.layouts = tuple(block.layout for block in host.blocks)
        self.skipped = dict(host.skipped)
        self.keep: dict[int, int] = {}
        self.left: dict[int, float] = {}
        self.whole: Counted | None = None
        self.counted: Counted | None = None
        self.probe: Probe | None = None
        self.recordings: list[Recording] = []

    def begin(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook: the first grid is there, by whichever entry point."""
        if self.recordings and not in_backward():
            forward = Forward(self.image or ((output.shape[1], output.shape[2]) if output.ndim == 4 else self.grid))
            for recording in self.recordings:
                recording.forwards.append(forward)
            self._finish()  # what an entry point that has no end has left
            here().forwards.setdefault(id(self), []).append((here().depth, forward))

    def start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: the model is called."""
        here().depth += 1

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: the forward has ended, by a result or an exception."""
        if id(self) in here().forwards:
            self._finish()
        here().depth = max(0, here().depth - 1)

    def _finish(self) -> None:
        """Ends the recording of forwards that are no less deep than this call; in a hook of the others it runs."""
        outer = [one for one in here().forwards.pop(id(self), []) if one[0] < here().depth]
        if outer:
            here().forwards[id(self)] = outer

    def predicted(self, table: LatencyTable) -> dict[tuple[int, int], float]:
        """Time at each batch of `table` and the usual size, as a share of the unpatched one."""
        if not self.keep or self.unpredictable():
            return {}
        assert self.whole is not None
        tokens = self.grid[0] * self.grid[1]
        return table.predicted(self.method.name, tokens, self._after() / self.whole.total, len(self.keep))

    def mark(self, index: int, point: str) -> None:
        """A point of a counted forward."""
        if self.probe is not None:
            self.probe.mark(index, point)

    def summary(self) -> dict[str, Any]:
        """The data of the report."""
        assert self.whole is not None
        before, after = float(self.whole.total), self._after()
        return {
            "method": self.method.name,
            "paper": self.method.paper,
            "family": self.adapter,
            "budget": str(self.budget),
            "tokens": self.grid[0] * self.grid[1],
            "flops_before": round(before),
            "flops_after": round(after),
            "flops_ratio": after / before,
            "places": [self._place(index) for index in sorted(self.keep)],
            "skipped": self.skipped,
            "notes": self._notes() if self.keep else [],
        }

    def _notes(self) -> list[str]:
        if not self.method.adaptive:
            return [*_SPANS]
        if not self.left:
            return [*_SPANS, "how many tokens go is known behind a forward; here all are counted"]
        if any(round(left) < self._tokens(index) for index, left in self.left.items()):
            return [*_SPANS]
        areas = " or ".join(str(area) for area in sorted({self.layouts[index].tiling.area for index in self.left}))
        name = self.method.name
        return [
            *_SPANS,
            f"no token went in the last forward: in windows of {areas} tokens {name} found none that can go; keep= or"
            " schedule= bounds what stays, and options of the method let more go",
        ]

    def _after(self) -> float:
        assert self.whole is not None
        if self.counted is None:
            return float(self.whole.total)
        after = float(self.counted.total)
        for index, left in self.left.items():  # of an adaptive method all tokens were counted
            after -= self.whole.spans[index] * (1 - left / self._tokens(index))
        return after

    def _tokens(self, index: int) -> int:
        return self.layouts[index].tokens(self.grid)

    def _place(self, index: int) -> dict[str, Any]:
        windows = self.layouts[index].windows(self.grid)
        out = self.left.get(index, windows * self.keep[index])
        return {"name": self.layouts[index].name, "tokens_in": self._tokens(index), "tokens_out": round(out)}


def attach(host: NarrowHost, patch: NarrowPatch) -> None:
    """Put the patch on the host's model."""
    for index, block in enumerate(host.blocks):
        NarrowSite(patch, index, block).attach(block)
    host.entry.register_forward_hook(patch.begin)
    host.model.register_forward_pre_hook(patch.start, prepend=True)
    host.model.register_forward_hook(patch.end, always_call=True)
