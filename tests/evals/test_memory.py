"""Peak memory against allocations of known size, and against the process's own high-water mark."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tokenprune.evals.memory import peak_extra_memory

MIB = 2**20


def block(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


def one_after_another() -> None:
    for size in (3, 7, 5):
        block(size)


def side_by_side() -> None:
    kept = [block(size) for size in (3, 7, 5)]
    del kept[1]
    block(6)


def inside_an_operator() -> torch.Tensor:
    return (torch.ones(MIB // 4) * 2).softmax(0)


@pytest.mark.parametrize(("call", "mib"), [(one_after_another, 7), (side_by_side, 15), (inside_an_operator, 2)])
def test_known_allocations(call, mib):
    assert peak_extra_memory(call) == pytest.approx(mib * MIB, abs=1024)


def test_what_was_there_before_is_not_counted_and_its_release_hides_nothing():
    held = [block(20)]

    def replace():
        held[0] = block(4)
        held[0] = block(9)

    assert 9 * MIB <= peak_extra_memory(replace) <= 13 * MIB + 1024


def test_a_device_that_cannot_be_measured():
    with pytest.raises(ValueError, match="meta"):
        peak_extra_memory(lambda: None, "meta")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_processs_own_high_water_mark_agrees():
    code = (
        "import resource, torch\n"
        "from tokenprune.evals.memory import peak_extra_memory\n"
        "def call():\n"
        "    x = torch.ones(80 * 2**18)\n"
        "    return (x * 2).exp().sum()\n"
        "peak_extra_memory(lambda: torch.ones(2**18).mul(2).exp().sum())\n"  # what the libraries load at first use
        "before = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the mark starts anew; getrusage's has the parent's in it
        "call()\n"
        "status = open('/proc/self/status').read().split('VmHWM:')[1]\n"
        "after = int(status.split()[0]) * 1024\n"
        "print((after - before) / 2**20, peak_extra_memory(call) / 2**20)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    resident, seen = map(float, run.stdout.split())
    assert seen == pytest.approx(240, abs=0.1)
    assert resident == pytest.approx(240, abs=10)
