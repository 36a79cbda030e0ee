"""The stacks that a method works in: how a host's blocks are divided, and which of them are left alone."""

from __future__ import annotations

from dataclasses import replace

from tokenprune.denoisers.host import DenoiserHost, Stack
from tokenprune.errors import BudgetError
from tokenprune.method import Method

FUSED = "queries, keys and values are projected at once there; unfuse the projections"


def divided(host: DenoiserHost, method: Method) -> list[Stack]:
    """The host's stacks, a mere row of blocks divided into stacks of the method's depth, or into a mixer and a stack
    of what is behind it.

    Of such rows, which are one stage, the first and the last stack are those at the edges.
    """
    if not host.divisible:
        return list(host.stacks)
    if method.mixer:
        return _behind_mixer(host, method.mixer)
    stacks = []
    for row in host.stacks:
        for first in range(0, len(row.blocks), method.stack_depth):
            blocks = row.blocks[first : first + method.stack_depth]
            stacks.append(Stack(f"{row.name}.{first}-{first + len(blocks) - 1}", blocks))
    ends = {stack.name for stack in (*stacks[:1], *stacks[-1:])}
    return [replace(stack, edge=stack.name in ends) for stack in stacks]


def _behind_mixer(host: DenoiserHost, share: float) -> list[Stack]:
    """The first `share` of all blocks, rounded down, at least one, in stacks of their own: those with an edge."""
    left = max(1, int(share * sum(len(row.blocks) for row in host.stacks)))
    stacks = []
    for row in host.stacks:
        for first, blocks in ((0, row.blocks[:left]), (left, row.blocks[left:])):
            if blocks:
                name = f"{row.name}.{first}-{first + len(blocks) - 1}"
                stacks.append(Stack(name, blocks, edge=first == 0 and left > 0))
        left = max(0, left - len(row.blocks))
    return stacks


def barred_stacks(stacks: list[Stack], method: Method) -> tuple[list[str], dict[str, str]]:
    """What the report says of stacks one block deep, and those that the method cannot work in."""
    if method.over_steps is not None:
        return [], {}
    if method.mixer:
        return [], {stack.name: "left alone: the patch mixer, which sees all tokens" for stack in stacks if stack.edge}
    if method.parts:
        refused = {stack.name: _refuse_parts(stack, method) for stack in stacks}
        return [], {name: f"left alone: {why}" for name, why in refused.items() if why is not None}
    barred = {}
    if "cross" in method.needs:
        barred = {s.name: "left alone: it has no cross-attention" for s in stacks if s.blocks[0].cross is None}
    shallow = [stack for stack in stacks if len(stack.blocks) == 1 and stack.name not in barred]
    if not shallow or not method.needs & {"queries", "keys", "cross"}:
        return [], barred
    for stack in shallow:
        if "cross" in method.needs:
            barred[stack.name] = "left alone: one block deep, and its cross-attention is not known before it"
        elif stack.blocks[0].before is None:
            barred[stack.name] = "left alone: one block deep, and its queries are not known before it"
    scored = [stack.name for stack in shallow if stack.name not in barred]
    notes = [f"one block deep, scored before the block from its own queries and keys: {', '.join(scored)}"]
    return notes if scored else [], barred


def _refuse_parts(stack: Stack, method: Method) -> str | None:
    """Why the method cannot run parts of this stack's blocks on fewer tokens; None if it can."""
    for facts in stack.blocks:
        # A block without cross-attention has just its other parts to run on fewer tokens.
        missing = [part for part in method.parts if part not in facts.parts and part != "cross"]
        if missing:
            return f"{facts.name} has no part {missing[0]!r} that can run on fewer tokens than the block"
        if "keys" in method.parts and facts.fused(facts.parts["keys"]):
            return FUSED
    return None


def shares_of(asked: tuple[tuple[str, float], ...], stacks: list[Stack]) -> dict[str, float]:
    """{stack: share} of a schedule that names stacks or their numbers."""
    names = [stack.name for stack in stacks]
    shares = {}
    for place, share in asked:
        name = names[int(place)] if place.lstrip("-").isdigit() and -len(names) <= int(place) < len(names) else place
        if name not in names:
            raise BudgetError(f"schedule names the stack {place!r}; the model has {', '.join(names)}")
        shares[name] = share
    return shares
