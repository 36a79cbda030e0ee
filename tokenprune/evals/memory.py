"""Peak memory of a call beyond what was allocated before it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

CPU = 0  # the profiler's number of the device type


def peak_extra_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors that are alive at once during `call()` and were not before, its result included.

    On a CPU every allocation and release is read off torch's profiler; what a library takes from the system by itself,
    such as the packing buffers of a matrix product, is not seen. On CUDA it is the allocator's own high-water mark.
    Elsewhere nothing can be measured.

    Raises:
        ValueError: neither a CPU nor CUDA.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"peak memory is measured on cpu and cuda, not on {device.type}")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for change in _changes(profiler):
        held += change
        peak = max(peak, held)
    return peak


def _changes(profiler: profile) -> list[int]:
    """Bytes allocated (positive) and released (negative) on the CPU, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == CPU]
    return [int(event["args"]["Bytes"]) for event in sorted(memory, key=lambda event: event["args"]["Ev Idx"])]
