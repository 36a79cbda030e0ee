"""A host's own suite, run in its folder by a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_suite(folder: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Its output is shown whatever it ends with. Its tests' limits of time do not hold: 120 s for what takes two tell
    of the machine."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:timeout", *arguments],
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(result.stdout[-20000:])
