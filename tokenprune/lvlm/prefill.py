"""A prompt's prefill in multiply-adds, and the tokens that meet a budget of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from tokenprune.costs import Curve
from tokenprune.errors import BudgetError
from tokenprune.lvlm.costs import TextCosts, count_call, count_text
from tokenprune.lvlm.host import LvlmHost
from tokenprune.lvlm.plan import share_out

if TYPE_CHECKING:
    from tokenprune.lvlm.costs import Given
    from tokenprune.lvlm.encoded import Encoded
    from tokenprune.lvlm.inside import Inside
    from tokenprune.lvlm.patch import LvlmPatch
    from tokenprune.lvlm.prompt import Image


@dataclass(eq=False)
class Prefill:
    """One prompt. tokens: of it, padding not counted. given: what encoded its images; share: its images' part of that.
    removed: tokens left out behind the tower. chosen: images as (how many are chosen from at once, tokens, kept). left:
    {layer: tokens from there on}; scored: keys looked at, at each stage."""

    tokens: int
    given: Sequence[Sequence[Given]]
    share: float
    removed: int = 0
    chosen: list[tuple[int, int]] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)
    scored: list[int] = field(default_factory=list)

    def keep(self, tokens: int, kept: int) -> None:
        """An image keeps `kept` of its tokens."""
        self.removed += tokens - kept
        self.chosen.append((tokens, kept))


def prefills(
    patch: LvlmPatch, images: Sequence[Image], encoded: Sequence[Encoded], lengths: Sequence[int]
) -> list[Prefill]:
    """The prompts of a batch, `lengths` tokens each."""
    whole = sum(len(image) for known in encoded for image in known.images or ())
    found = []
    for sample, length in enumerate(lengths):
        own = sum(image.places for image in images if image.sample == sample)
        found.append(Prefill(int(length), [known.given for known in encoded], own / max(1, whole)))
    return found


def record_left(prompts: Sequence[Prefill], inside: Inside) -> None:
    """Note how many tokens of each prompt were in the layers behind each stage, and how many were looked at."""
    for row, prompt in enumerate(prompts):
        prompt.left = {stage.place: int(stage.valid[row].sum()) for stage in inside.stages}
        prompt.scored = [counts[row] for counts in inside.scored]


def mean_costs(patch: LvlmPatch) -> tuple[float, float]:
    """Multiply-adds of the last prompts without and with the patch, the mean over a batch; 0 before the first."""
    model = patch.model() if patch.model is not None else None
    if model is None or not patch.prompts:
        return 0.0, 0.0
    text = _text(patch, patch.describe(model), max(prompt.tokens for prompt in patch.prompts))
    before = [_encoding(patch, prompt) + text.total(prompt.tokens) for prompt in patch.prompts]
    after = [
        _encoding(patch, prompt, scored=True)
        + sum(_selecting(patch, tokens, kept) for tokens, kept in prompt.chosen)
        + text.total(prompt.tokens - prompt.removed, prompt.left, prompt.scored)
        for prompt in patch.prompts
    ]
    return fmean(before), fmean(after)


def solve_tokens(patch: LvlmPatch, prompt: Prefill, sizes: Sequence[int]) -> list[int]:
    """Tokens that each image of a prompt keeps for a flops budget, in proportion to their sizes.

    Raises:
        BudgetError: it cannot be met; the message names the floor.
    """
    text = _of_prompt(patch, prompt)
    fixed, whole = _encoding(patch, prompt, scored=True), _encoding(patch, prompt) + text.total(prompt.tokens)

    def cost(kept: int) -> float:
        counts = share_out(kept, sizes, "")
        choosing = sum(_selecting(patch, size, count) for size, count in zip(sizes, counts, strict=True))
        return fixed + choosing + text.total(prompt.tokens - sum(sizes) + kept)

    return share_out(_nearest(patch, cost, whole, len(sizes), sum(sizes)), sizes, "")


def solve_final(patch: LvlmPatch, prompt: Prefill, total: int, on_grid: int) -> int:
    """Tokens of a prompt's `total` that are left behind the last stage for a flops budget.

    Raises:
        BudgetError: it cannot be met; the message names the floor.
    """
    text, recipe = _of_prompt(patch, prompt), patch.inside
    assert recipe is not None
    whole = _encoding(patch, prompt) + text.total(prompt.tokens)

    def cost(final: int) -> float:
        rate = recipe.rate(final / total, total, on_grid)
        here, left, scored = total, {}, []
        for stage, place in enumerate(patch.places):
            scored.append(here if recipe.softmax == "visual" else prompt.tokens - total + here)
            kept = max(final, recipe.kept(rate, stage, here, total))
            if stage == 0:
                kept += round(on_grid * (1 - kept / total))
            here = final if stage == len(patch.places) - 1 else min(here, kept)
            left[place] = prompt.tokens - total + here
        return _encoding(patch, prompt) + text.total(prompt.tokens, left, scored)

    return _nearest(patch, cost, whole, 1, total)


def _nearest(patch: LvlmPatch, cost: Callable[[int], float], whole: float, fewest: int, most: int) -> int:
    """The number of tokens with the cost nearest to the budget's."""
    budget = patch.budget
    floor = cost(fewest) / whole
    if floor > budget.value + 0.01:
        raise BudgetError(
            f"{budget} cannot be met: with one token of each image the prefill still costs {floor:.3f} of the unpatched"
            f" one, image tower and scoring counted; use flops={min(1.0, floor + 0.005):.3f} or more"
        )
    low, high = fewest, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget.value * whole else (low, middle)
    found = min((low, high), key=lambda kept: abs(cost(kept) / whole - budget.value))
    reached = cost(found) / whole
    if abs(reached - budget.value) > 0.01:
        raise BudgetError(f"{budget} cannot be met within 1%: whole tokens of this prompt give flops={reached:.3f}")
    return found


def _of_prompt(patch: LvlmPatch, prompt: Prefill) -> TextCosts:
    assert patch.model is not None
    model = patch.model()
    assert model is not None
    return _text(patch, patch.describe(model), prompt.tokens)


def _text(patch: LvlmPatch, host: LvlmHost, tokens: int) -> TextCosts:
    if patch.spent.text is None:
        assert host.example is not None
        patch.spent.text = count_text(host, host.example, tokens)
    return patch.spent.text


def _encoding(patch: LvlmPatch, prompt: Prefill, *, scored: bool = False) -> float:
    """Of the tower and the projector, and of scoring there."""
    assert patch.model is not None
    model = patch.model()
    assert model is not None
    host, cost = patch.describe(model), 0.0
    for calls in prompt.given:
        for module, call in zip((host.tower, host.projector), calls, strict=False):
            key = module is host.tower, call.shapes
            if key not in patch.spent.encoder:
                assert module is not None
                patch.spent.encoder[key] = count_call(module, call)
            cost += patch.spent.encoder[key]
        if scored:
            looks = ("score", calls[0].shapes)
            cost += sum(spent for of, spent in patch.spent.choice.items() if of[:2] == looks)
    return cost * prompt.share


def _selecting(patch: LvlmPatch, tokens: int, kept: int) -> float:
    """Of choosing `kept` of an image's tokens: as counted, or by the polynomial through what was."""
    counted: dict[int, float] = {}
    for key, spent in patch.spent.choice.items():
        if key[0] == "select" and key[2] == tokens:
            counted[key[3]] = spent / key[1]
    if kept in counted or not counted:
        return counted.get(kept, 0.0)
    return Curve(tuple((count, round(cost)) for count, cost in sorted(counted.items())[:3]))(kept)
