"""Whether a method can be on a denoiser, and its patch."""

from __future__ import annotations

from torch import nn

from tokenprune.budget import Budget
from tokenprune.denoisers.caching import CachingPatch
from tokenprune.denoisers.deferred import DeferredPatch
from tokenprune.denoisers.host import Stack
from tokenprune.denoisers.patch import DenoiserPatch, Describe
from tokenprune.denoisers.run import positions_from
from tokenprune.denoisers.stacks import divided
from tokenprune.errors import BudgetError, UnsupportedMethod
from tokenprune.family import Request
from tokenprune.method import Method
from tokenprune.schedule import Layout


def prepare(describe: Describe, model: nn.Module, adapter: str, method: Method, request: Request) -> DenoiserPatch:
    """The patch of a denoiser, its budget solved where the usual input is known; nothing is attached yet.

    Raises:
        UnsupportedMethod: the method needs what a denoiser does not have.
        BudgetError: the budget cannot be met.
    """
    host = describe(model)
    if request.positions is not None:
        raise UnsupportedMethod("positions= is of the tokens of a prompt, and a denoiser has none; leave it out")
    if request.restore is not None:
        raise UnsupportedMethod("restore= is of image towers; behind a stack of a denoiser all tokens are back")
    if method.adaptive:
        raise UnsupportedMethod(
            f"{method.name} keeps a different number of tokens in each image, which no denoiser runs"
        )
    if method.learned is not None:
        raise UnsupportedMethod(f"{method.name} learns for the blocks of an image tower, not for those of a denoiser")
    if method.proportional:
        raise UnsupportedMethod(
            f"{method.name} adds log(size) to the attention logits, and these attentions take no bias;"
            f" patch(pipe, {method.name!r}, proportional=False, ...) works"
        )
    if "mixer" in method.needs and not host.divisible:
        raise UnsupportedMethod(
            f"{method.name} needs mixer blocks, one row in which the first may see all tokens, and a"
            f" {type(model).__name__} is none: convolutions stand between its stacks"
        )
    missing = method.needs - {"queries", "keys", "cross", "stacks", "grid", "steps", "mixer"}
    if missing:
        raise UnsupportedMethod(f"{method.name} needs {', '.join(sorted(missing))}, which a denoiser does not expose")
    if request.budget.kind == "tokens":
        raise BudgetError(f"{request.budget}: behind each stack all tokens are there again; use keep= or flops=")
    _check_own(method, request.budget)
    _check_shares(method, request.budget)
    kind = DenoiserPatch if method.over_steps is None else CachingPatch
    kind = DeferredPatch if method.mixer else kind
    patch = kind(describe, host, adapter, method, request)
    if patch.active and len(patch.barred) == len(divided(host, method)):
        raise UnsupportedMethod(
            f"{method.name} can be applied nowhere: " + "; ".join(map(" ".join, patch.barred.items()))
        )
    if patch.active:
        _check_projections(divided(host, method), method)
        patch.caches.refuse(model, anew=True)
    if patch.active and host.example is not None:
        whole = patch.scheduled()
        first = whole[0] if whole else patch.last_timestep
        patch.plan(model, host.example(), positions_from(first, whole, patch.last_timestep))
    return patch


def _check_projections(stacks: list[Stack], method: Method) -> None:
    for stack in stacks:
        first = stack.blocks[0]
        wanted = len(stack.blocks) > 1 and bool(method.needs & {"queries", "keys"})
        crossed = "cross" in method.needs and first.cross is not None
        if (wanted and first.queries is None) or (crossed and first.cross.keys is None):  # type: ignore[union-attr]
            raise UnsupportedMethod(
                f"{method.name} needs queries and keys, which {first.name} does not put out on their own (fused"
                " projections); unfuse them, or take a method that needs none, such as 'random'"
            )


def _check_own(method: Method, budget: Budget) -> None:
    """Raise where the method's own option says how many tokens leave the blocks of an image tower."""
    ignored = budget.option == "r" or (budget.option == "rate" and budget.value != method.stack_share)
    if budget.kind == "own" and ignored:
        raise BudgetError(
            f"{budget} counts tokens that leave the blocks of an image tower, and behind a denoiser's stacks all are"
            f" there again; patch(pipe, {method.name!r}, keep={method.stack_share:g}) works"
        )


def _check_shares(method: Method, budget: Budget) -> None:
    many = 10**6
    least = method.schedule.fewest(many, Layout(1, 0)) / many
    asked = [budget.value] if budget.kind == "keep" else [share for _, share in budget.shares]
    if any(share < least for share in asked):
        raise BudgetError(
            f"{budget} asks {method.name} to compute fewer than the {least:.3g} of a stack's tokens that it must leave;"
            f" use keep={least:.3g} or more"
        )
