"""Fresh buffers hold NaN in the kernel tests, so that what is read before it is written shows."""

import os
from collections.abc import Iterator

import pytest
import torch

# test_interpreted runs it where Triton is its interpreter.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
