"""What one process of a distributed test runs: a plain module, that a new process can import by its name whatever
other packages call themselves `tests`."""

from __future__ import annotations

import os

import torch
from families import build, images
from torch import nn
from torch.nn import functional as F

import tokenprune


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
