"""Processes of a distributed test, and what one of them runs: a plain module, that a new process can import by its name
whatever other packages call themselves `tests`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from families import build, images
from torch import nn
from torch.nn import functional as F

import tokenprune


def environments(count: int) -> list[dict[str, str]]:
    """What a launcher would tell each of `count` processes, which find the tests' modules and use one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    shared = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start(count: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` in `count` processes, whose outputs can be read."""
    command = [sys.executable, *map(str, arguments)]
    return [
        subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for told in environments(count)
    ]


def train_one_rank(rank: int, folder: str) -> None:
    """A training step of a patched model in DistributedDataParallel, two of four images in each of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = tokenprune.patch(build("class_token"), "tome", keep=0.5)
    both = images(model, 4)
    parallel = nn.parallel.DistributedDataParallel(model)
    loss = F.mse_loss(parallel(both[2 * rank : 2 * rank + 2]), torch.zeros(2, 1000))
    loss.backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, os.path.join(folder, "grads"))
    torch.distributed.destroy_process_group()
