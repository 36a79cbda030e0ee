"""The check at patch time that a block run through its own parts still gives the host's output."""

from __future__ import annotations

import torch
from torch import nn

from tokenprune.ghost import ghost
from tokenprune.host import Host


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
        elif not _equal(block.module, block.mid, host.num_prefix_tokens + block.check_tokens):
            block.mid, block.mid_refused = None, "run through its own parts it gives another output"


def _equal(module: nn.Module, mid: type[nn.Module], tokens: int) -> bool:
    weight = next(p for p in module.parameters() if p.is_floating_point())
    if weight.device.type == "meta":
        return True
    plain, swapped = ghost(module), ghost(module)
    swapped.__class__ = mid
    generator = torch.Generator(device=weight.device).manual_seed(0)
    width = next(p.shape[-1] for name, p in module.named_parameters() if "norm1" in name and p.ndim == 1)
    x = torch.randn(1, tokens, width, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)
    with torch.no_grad():
        return bool(torch.equal(plain(x), swapped(x)))
