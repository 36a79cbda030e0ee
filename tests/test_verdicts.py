"""What the checks find out of a model's blocks when it is patched holds for what is attached."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from families import build, images, run
from torch import Tensor, nn

import tokenprune
from tokenprune.site import Site


def sites(model: nn.Module) -> list[Site]:
    hooks = [hook for block in model.blocks for hook in block._forward_pre_hooks.values()]
    return [hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), Site)]


def replaced(block: nn.Module) -> None:
    """A forward on the instance, as offloading and caches put there."""
    own = type(block).forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = own(block, x, *args, **kwargs)
        return out

    block.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["top_k", "tome"])
def test_a_block_that_cannot_be_run_in_parts_is_reduced_behind_it(method: str) -> None:
    model = build("class_token")
    x = images(model)
    replaced(model.blocks[1])
    plain = run(model, x)
    tokenprune.patch(model, method, schedule={1: 0.6})
    seen: list[int] = []
    model.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    reduced = run(model, x)
    assert seen == [22]
    assert not torch.equal(reduced, plain)
    told = tokenprune.report(model).to_dict()
    assert "replaced on the instance" in told["skipped"]["blocks.1"]
    with tokenprune.patched(model, "top_k", keep=0.9):
        run(model, x)
    assert torch.equal(run(model, x), reduced)  # what is put back is as it was
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)


def test_a_packed_batch_goes_through_an_attention_at_once() -> None:
    """The host's projections run once for all images, also in a copy and where a patch is put back."""
    model = build("class_token")
    x = images(model, 4)
    tokenprune.patch(model, "adaptive_tome", threshold=0.6)
    for one in (model, pickle.loads(pickle.dumps(model))):
        assert all(site.intercepts for site in sites(one))
        calls: list[tuple[int, ...]] = []
        one.blocks[3].attn.qkv.register_forward_hook(lambda module, args, out, calls=calls: calls.append(out.shape))
        run(one, x)
        left = tokenprune.report(one).to_dict()["places"][2]
        assert left["fewest"] < left["most"]
        assert [shape[0] for shape in calls] == [1]
        assert len(calls) == 1
    with tokenprune.patched(model, "top_k", keep=0.9):
        pass
    assert all(site.intercepts for site in sites(model))


def test_a_model_is_checked_by_itself_behind_a_checkpointed_backward() -> None:
    """Where gradient checkpointing stops in the middle of a block, nothing of it is left for the next one."""
    model, other = build("class_token"), build("rotary_registers")
    model.set_grad_checkpointing(True)
    tokenprune.patch(model, "top_k", schedule={0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5}, prefix_only_last=False).train()
    model(images(model)).sum().backward()
    tokenprune.patch(other, "top_k", keep=0.5)
    assert not tokenprune.report(other).to_dict()["skipped"]
    assert all(site.mid for site in sites(other))
