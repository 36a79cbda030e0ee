"""The check at patch time that a block run through its own parts still gives the host's output."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from tokenprune.ghost import ghost
from tokenprune.host import BlockHost, Host


def check_blocks(host: Host) -> None:
    """Compare every block that has a `mid` class with it, on a small random input, and withdraw the class where the
    outputs differ in a single bit (the block is then reduced behind its MLP, and the report says so).

    On the meta device there are no values to compare, and the structure decides.
    """
    for block in host.blocks:
        if block.mid is None:
            continue
        if "forward" in vars(block.module):
            block.mid, block.mid_refused = None, "its forward is replaced on the instance"
        elif not _equal(host, block, block.mid):
            block.mid, block.mid_refused = None, "run through its own parts it gives another output"


def _equal(host: Host, block: BlockHost, mid: type[nn.Module]) -> bool:
    parameters = chain(block.module.parameters(), host.model.parameters())
    weight = next(p for p in parameters if p.is_floating_point())
    if weight.device.type == "meta":
        return True
    plain, swapped = ghost(block.module), ghost(block.module)
    swapped.__class__ = mid
    generator = torch.Generator(device=weight.device).manual_seed(0)
    shape = 1, host.num_prefix_tokens + block.check_tokens, block.width
    x = torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)
    with torch.no_grad():
        return bool(torch.equal(plain(x), swapped(x)))
