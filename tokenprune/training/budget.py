"""The last step of a training: learned parts that cost in the mean what was asked for."""

from __future__ import annotations

import warnings
from dataclasses import replace

from torch import Tensor, nn

from tokenprune.bisection import nearest_to
from tokenprune.calibration import MET, NEAR, mean_flops
from tokenprune.learned_parts import LearnedParts
from tokenprune.learning import Learned, Shape
from tokenprune.method import Method
from tokenprune.registry import make_method

ROUNDS = 12


def budget_of(method: Method, flops: float) -> dict[str, float]:
    """What `patch` is told of the budget: nothing where it follows from what is learned."""
    return {} if method.adaptive else {"flops": flops}


def on_budget(model: nn.Module, parts: LearnedParts, images: Tensor, batch_size: int) -> LearnedParts:
    """`parts` with `flops_ratio`, the mean over the images [N, C, H, W] counted where tokens really leave, among what
    was found; where that is not near the budget, weakened or strengthened as a whole until it is."""
    method = make_method(parts.method, dict(parts.options))
    learned = method.learned
    assert learned is not None
    aim = parts.found["flops"]

    def tried(factor: float) -> tuple[float, LearnedParts]:
        changed = parts if learned.weaken is None else _weakened(parts, learned, factor)
        options = {**parts.options, **budget_of(method, aim), "weights": changed}
        ratio, _ = mean_flops(model, images, parts.method, batch_size, options)
        return ratio, replace(changed, found={**parts.found, "flops_ratio": ratio, "factor": factor})

    rounds = ROUNDS if learned.weaken is not None else 1
    ratio, best = nearest_to(aim, tried, 0.0, 2.0, first=1.0, rising=False, near=NEAR, rounds=rounds)
    if abs(ratio - aim) > MET:
        warnings.warn(
            f"what was learned costs {ratio:.3f} of the multiply-adds in the mean, not {aim:g}: train longer, or with"
            " another learning_rate",
            stacklevel=3,
        )
    return best


def _weakened(parts: LearnedParts, learned: Learned, factor: float) -> LearnedParts:
    assert learned.weaken is not None
    width, depth = parts.architecture["width"], parts.architecture["blocks"]
    places = {name.split(".", 1)[0] for name in parts.tensors}
    modules = nn.ModuleDict({place: learned.part(Shape(width, int(place), depth)) for place in sorted(places, key=int)})
    modules.load_state_dict(dict(parts.tensors))
    for part in modules.values():
        learned.weaken(part, factor)
        if learned.settle is not None:
            learned.settle(part)
    return replace(parts, tensors={name: tensor.clone() for name, tensor in modules.state_dict().items()})
