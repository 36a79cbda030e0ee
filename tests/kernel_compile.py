"""Kernels compiled for GPUs that are not there: what their wrappers launch is caught, and compiled for any target."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import create_function_from_signature

CAPABILITIES = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """A launch of a tuned kernel, not carried out."""

    kernel: Autotuner
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def configs(self) -> list[triton.Config]:
        """The configurations that would be tried."""
        self.kernel.nargs = dict(zip(self.kernel.arg_names, self.args, strict=False))
        return list(self.kernel.prune_configs(self.kwargs))


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers of a thread, and bytes of its memory on the stack (spills)."""

    registers: int
    stack: int
    local: int


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """The launches inside, caught in place of being carried out."""
    launches: list[Launch] = []

    def catch(self: Autotuner, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    plain, Autotuner.run = Autotuner.run, catch
    try:
        yield launches
    finally:
        Autotuner.run = plain


def launches_of(run: Callable[[], object]) -> list[Launch]:
    """What `run` launches."""
    with caught() as launches:
        run()
    return launches


def resources(launch: Launch, config: triton.Config, capability: int) -> Resources:
    """What the launch takes under a configuration on a GPU of this capability (80 for 8.0)."""
    target = GPUTarget("cuda", capability, 32)
    backend, function = make_backend(target), launch.kernel.fn
    kwargs = {**launch.kwargs, **config.all_kwargs()}
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = function._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert counts is not None, told
    return Resources(*map(int, counts.groups()))
