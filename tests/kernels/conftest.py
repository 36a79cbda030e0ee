"""Fresh buffers hold NaN in the kernel tests, so that what is read before it is written shows."""

from collections.abc import Iterator

import pytest
import torch
from kernel_inputs import INTERPRETED, TRITON_DEVICE

# Without a GPU test_interpreted runs it where Triton is its interpreter.
collect_ignore = [] if INTERPRETED or TRITON_DEVICE.type == "cuda" else ["accelerated"]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=TRITON_DEVICE.type == "cuda")
    assert torch.empty(3, device=TRITON_DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
