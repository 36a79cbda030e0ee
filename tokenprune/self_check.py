"""The check at patch time that a block run through its own parts still gives the host's output."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedModel
from tokenprune.ghost import ghost
from tokenprune.host import BlockHost, Host
from tokenprune.ragged_attention import AnswerAttention, attended
from tokenprune.state import flow


@dataclass(frozen=True)
class Verdict:
    """What the checks have found out of a block, in the words of `BlockHost`; the block itself is not held."""

    mid: bool
    mid_refused: str
    front: bool
    intercepts: bool


def verdicts(host: Host) -> tuple[Verdict, ...]:
    """What the checks have left of each block."""
    return tuple(Verdict(b.mid is not None, b.mid_refused, bool(b.front_swaps), b.intercepts) for b in host.blocks)


def follow(host: Host, found: tuple[Verdict, ...]) -> Host:
    """`host`, told anew by the adapter, with what the checks have found out before."""
    for block, verdict in zip(host.blocks, found, strict=True):
        if not verdict.mid:
            block.mid, block.mid_refused = None, verdict.mid_refused
        if not verdict.front:
            block.front_swaps = ()
        block.intercepts = verdict.intercepts
    return host


def check_blocks(host: Host) -> None:
    """Compare every block that has a `mid` class with it, on a small random input, and withdraw the class where the
    outputs differ in a single bit (the block is then reduced behind its MLP, and the report says so).

    On the meta device there are no values to compare, and the structure decides.
    """
    flow().clear()  # a checkpointed block that backward ran once more may have been left in its middle
    for block in host.blocks:
        if block.mid is None:
            continue
        if "forward" in vars(block.module):
            block.mid, block.mid_refused = None, "its forward is replaced on the instance"
        elif not _equal(host, block, block.mid):
            block.mid, block.mid_refused = None, "run through its own parts it gives another output"


def check_bias(host: Host) -> None:
    """Say that a block takes no bias where it takes one by running its attention by parts, and a bias of zeros gives
    another output."""
    for block in host.blocks:
        if block.in_row and block.takes_bias:
            block.takes_bias = _same_with_zeros(host, block)


def _same_with_zeros(host: Host, block: BlockHost) -> bool:
    weight, copies = _weight(host, block), dict[int, nn.Module]()
    if weight.device.type == "meta":
        return True
    plain, swapped = ghost(block.module), ghost(block.module, memo=copies)
    for module, cls in block.swaps:
        copies[id(module)].__class__ = cls
    x = _noise(weight, block.check_tokens, block.width)[0]
    arguments = block.check_arguments(x) if block.check_arguments is not None else {}
    assert block.key_bias is not None
    zeros = {block.key_bias: x.new_zeros(1, 1, 1, len(x))}
    with torch.no_grad():
        return _close(swapped(x, **arguments, **zeros), plain(x, **arguments))


def _weight(host: Host, block: BlockHost) -> nn.Parameter:
    """A parameter of the block, or of the model, that says device and dtype."""
    parameters = chain(block.module.parameters(), host.model.parameters())
    return next(p for p in parameters if p.is_floating_point())


def _equal(host: Host, block: BlockHost, mid: type[nn.Module]) -> bool:
    weight = _weight(host, block)
    if weight.device.type == "meta":
        return True
    plain, swapped = ghost(block.module), ghost(block.module)
    swapped.__class__ = mid
    x = _noise(weight, host.num_prefix_tokens + block.check_tokens, block.width)
    x = x[0] if block.in_row else x
    arguments = block.check_arguments(x) if block.check_arguments is not None else {}
    with torch.no_grad():
        return bool(torch.equal(plain(x, **arguments), swapped(x, **arguments)))


def _noise(weight: nn.Parameter, tokens: int, width: int) -> Tensor:
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x = torch.randn(1, tokens, width, generator=generator, device=weight.device, dtype=torch.float32)
    return x.to(weight.dtype)


def _close(got: Tensor, expected: Tensor) -> bool:
    tolerance = 100 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return torch.allclose(got, expected, rtol=0, atol=tolerance)


def check_front(host: Host) -> bool:
    """Whether the prefix tokens that the last block puts out where it computes no others are those that it puts out
    among all, on a small random input. Its `front_swaps` are withdrawn where they alone make a difference.

    On the meta device there are no values to compare, and the structure decides.
    """
    block = host.blocks[-1]
    if any("forward" in vars(module) for module, _ in block.front_swaps):
        block.front_swaps = ()
    if block.mid is None or _weight(host, block).device.type == "meta" or _front_is_same(host, block, block.mid):
        return True
    if not block.front_swaps:
        return False
    block.front_swaps = ()
    return _front_is_same(host, block, block.mid)


def _front_is_same(host: Host, block: BlockHost, mid: type[nn.Module]) -> bool:
    prefix, copies = host.num_prefix_tokens, dict[int, nn.Module]()
    plain, swapped = ghost(block.module), ghost(block.module, memo=copies)
    swapped.__class__ = mid
    for module, cls in block.front_swaps:
        copies[id(module)].__class__ = cls
    x = _noise(_weight(host, block), prefix + block.check_tokens, block.width)
    arguments = block.check_arguments(x) if block.check_arguments is not None else {}
    with torch.no_grad():
        expected = plain(x, **arguments)[:, :prefix]
        flow().front = prefix
        try:
            got = swapped(x, **arguments)
        finally:
            flow().front = None
    return got.shape == expected.shape and _close(got, expected)


def check_packing(host: Host) -> None:
    """Find out which attentions may run once on the tokens of several images, with scaled_dot_product_attention
    answered by the packed kernel: those that then give what they give for each image alone. The others run once for
    each length.

    Raises:
        UnsupportedModel: an attention's forward is replaced on the instance, so that neither would be noticed.
    """
    for block in host.blocks:
        for attention in block.attentions:
            if "forward" in vars(attention):
                raise UnsupportedModel(
                    f"the forward of an attention in {block.name} is replaced on the instance (offloading, a cache?);"
                    " remove that first, or use a method with a fixed number of tokens"
                )
        block.intercepts = all(_packs(host, block, attention) for attention in block.attentions)


def _packs(host: Host, block: BlockHost, attention: nn.Module) -> bool:
    weight = _weight(host, block)
    if weight.device.type == "meta":
        return False
    alone = ghost(attention)
    lengths = (host.num_prefix_tokens + 4, host.num_prefix_tokens + 7)
    x = _noise(weight, sum(lengths), block.width)
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=weight.device)
    try:
        with torch.no_grad(), AnswerAttention(lengths, starts) as answer:
            packed = attended(alone(x))
        with torch.no_grad():
            expected = torch.cat([attended(alone(part)) for part in torch.split(x, list(lengths), 1)], 1)
    except Exception:  # whatever it is that an attention cannot do with a packed sequence
        return False
    return answer.calls > 0 and _close(packed, expected)
