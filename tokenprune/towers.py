"""Towers: the family of image towers, and how a patch of one is prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from tokenprune.budget import Budget
from tokenprune.counting import compute_prefix_only, corrected, count_costs, count_patched, reads_prefix_only
from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import Request
from tokenprune.host import Adapter, BlockHost, Host
from tokenprune.learned_parts import LearnedParts, architecture, block_norms
from tokenprune.method import Method, Restore, refuse_recover
from tokenprune.patch import Patch, attach
from tokenprune.placed_parts import Untrained, chosen, loaded, of_any_size, shipped_options
from tokenprune.schedule import BeforeLast
from tokenprune.self_check import check_bias, check_blocks, check_packing, follow, verdicts

_DEFAULT = Budget()


class Towers:
    """The family (`tokenprune.family.Family`) of the models of one adapter: image towers, from facts about a Host."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.name = adapter.name

    def find(self, target: object) -> nn.Module | None:
        """The adapter's model in `target`, or None."""
        return self.adapter.find(target)

    def prepare(self, model: nn.Module, method: Method, request: Request) -> Patch:
        """The patch of an image tower."""
        refuse_recover(method, type(model).__name__)
        if request.steps is not None:
            raise UnsupportedMethod(
                f"steps= is for denoising runs, and {type(model).__name__} has none; use schedule={{block: share}}"
            )
        if request.positions is not None:
            raise UnsupportedMethod(
                f"positions= is of the tokens of a prompt, and {type(model).__name__} has none; leave it out"
            )
        host = self.adapter.host(model)
        if method.learned is not None and request.weights is None and request.remade is not None:
            method = request.remade(shipped_options(host, self.adapter.name, method, request.budget))
        method = restoring(method, request.restore)
        return prepare(
            host,
            self.adapter,
            method,
            request.budget,
            prefix_only_last=request.prefix_only_last,
            weights=request.weights,
        )

    def attach(self, model: nn.Module, patch: Patch) -> None:
        """Put a patch on the tower."""
        attach(follow(self.adapter.host(model), patch.verdicts), patch)


def prepare(
    host: Host,
    adapter: Adapter,
    method: Method,
    budget: Budget,
    *,
    prefix_only_last: bool,
    weights: object = None,
) -> Patch:
    """The patch of `host`, its budget solved at the model's usual input; nothing is attached yet.

    prefix_only_last, weights: see `tokenprune.patch`.

    Raises:
        UnsupportedModel: a block stands at several places.
        UnsupportedMethod: the method needs what the model does not have.
        BudgetError: the budget cannot be met.
    """
    if len({id(block.module) for block in host.blocks}) < len(host.blocks):
        raise UnsupportedModel(
            f"blocks of {type(host.model).__name__} are one and the same module, run several times in a forward; give"
            " each place a module of its own (copy.deepcopy)"
        )
    patch = Patch(host, adapter.name, method, budget)
    if patch.fuses:
        _check_fusion(host, patch)
    if method.proportional:
        check_bias(host)
    if method.proportional and not all(block.takes_bias for block in host.blocks):
        raise UnsupportedMethod(
            f"{method.name} adds log(size) to the attention logits, and {type(host.blocks[0].module).__name__} takes no"
            f" bias; patch(model, {method.name!r}, proportional=False, ...) works"
        )
    if patch.active and method.adaptive:
        _check_adaptive(host, method, budget)
    if patch.active:
        missing = method.needs - {kind for block in host.blocks for kind in _caught(block)}
        if missing:
            raise UnsupportedMethod(
                f"{method.name} needs {', '.join(sorted(missing))}, which this model does not expose"
            )
    if method.learned is not None and host.row is not None:
        raise UnsupportedMethod(
            f"{method.name} learns from images in a batch, and those of a {type(host.model).__name__} lie in one row"
        )
    if method.mask is not None and not all(block.takes_bias for block in host.blocks):
        raise UnsupportedMethod(
            f"{method.name} masks keys while it learns, and {type(host.blocks[0].module).__name__} takes no bias; a"
            " method that learns nothing works, such as 'top_k'"
        )
    stored = None
    if patch.active and method.learned is not None:
        stored = chosen(host, adapter.name, patch, weights)
        patch.learned = of_any_size(host, patch) if method.learned.sized else loaded(host, patch, stored)
    check_blocks(host)
    patch.costs = count_costs(host, adapter, patch)
    if prefix_only_last and not patch.fuses and not method.training_only and reads_prefix_only(host, patch):
        compute_prefix_only(host, adapter, patch)
    if patch.active:
        counts = patch.counts(host.tokens)
        if budget.kind == "flops" and not method.adaptive:
            patch.solved[host.tokens], patch.counted = corrected(host, adapter, patch, counts)
        elif not method.adaptive:  # what an image costs is known when it is there
            patch.counted = count_patched(host, adapter, patch)
        if stored is not None and method.learned is not None and method.learned.sized:
            patch.learned = loaded(host, patch, stored)
    patch.verdicts = verdicts(host)
    return patch


def restoring(method: Method, restore: str | None) -> Method:
    """The method with what a user wants to stand for the tokens that leave, None for its own."""
    known: tuple[Restore, ...] = get_args(Restore)
    choice = next((name for name in known if name == restore), None)
    if restore is not None and choice is None:
        raise UnsupportedMethod(f"restore={restore!r} is none of {', '.join(map(repr, known))}")
    if restore == "unmerge" and not method.merges:
        raise UnsupportedMethod(
            f"restore='unmerge' copies a group's value to its members, and {method.name} drops tokens; its own is"
            f" restore={method.restoration!r}"
        )
    method = method if choice is None else replace(method, restore=choice)
    if method.restoration == "fusion":
        method = replace(method, schedule=BeforeLast(method.schedule))
    return method


def _check_fusion(host: Host, patch: Patch) -> None:
    if host.row is not None:
        raise UnsupportedMethod(
            f"restore='fusion' is not known for a {type(host.model).__name__}, whose images lie in one row; use another"
            " restore="
        )
    last = len(host.blocks) - 1
    if not patch.places or last in patch.places:
        raise BudgetError(
            f"restore='fusion' brings all tokens back in front of block {last}, the last: tokens cannot be reduced in"
            f" it{'' if patch.places else ' alone'}; name places before it, or use another restore="
        )
    patch.skipped[host.blocks[-1].name] = "all tokens come back in front of it (restore='fusion')"


def _check_adaptive(host: Host, method: Method, budget: Budget) -> None:
    if budget.kind == "flops" and method.learned is None:
        raise BudgetError(
            f"{method.name} keeps a different number of tokens in each image, and what that costs on average is not"
            f" known without calibration: {budget} cannot be met; where it has a threshold,"
            " tokenprune.calibrate finds the one that meets it. keep=, tokens= and schedule= work, as the most that is"
            " kept of an image, and so do the method's own options"
        )
    if not host.ragged_head or not all(block.ragged_swaps for block in host.blocks):
        raise UnsupportedMethod(
            f"{method.name} keeps a different number of tokens in each image, which {type(host.model).__name__} cannot"
            " run; a method with a fixed number works, such as 'top_k'"
        )
    check_packing(host)


def untrained(
    host: Host,
    adapter: Adapter,
    method: Method,
    options: Mapping[str, Any],
    budget: Budget = _DEFAULT,
    seed: int = 0,
) -> LearnedParts:
    """The learned parts of a method as they are before a training for `budget`.

    Raises:
        TokenPruneError: as of `prepare`, where the method cannot be on this model.
    """
    method = restoring(method, None)
    patch = prepare(host, adapter, method, budget, prefix_only_last=True, weights=Untrained(seed))
    assert patch.learned is not None
    tensors = patch.learned.state_dict()
    return LearnedParts(method.name, options, tensors, architecture(host, adapter.name), block_norms(host))


def _caught(block: BlockHost) -> set[str]:
    kinds = {kind for kind, _ in block.taps}
    own = {"block_input"} | ({"queries", "keys"} if "inputs" in kinds else set())
    return kinds | own | ({"values"} if block.values else set()) | (set() if block.in_row else {"first_block"})
