"""A method of your own, in thirty lines: keep the patches that are least like the others.

Run it: python examples/custom_method.py
"""

import torch
from torch import Tensor

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.evals.digits import cluttered_digits
from tokenprune.evals.digits_vit import digits_vit
from tokenprune.method import Method
from tokenprune.schedule import Stages
from tokenprune.selection.top_k import keep_top_k


def rarity(record: AttentionRecord) -> Tensor:
    """How unlike the mean key a patch's key is, the mean over heads: [B, n], the higher the sooner it is kept."""
    keys = record.k[:, :, record.num_prefix_tokens :].float()
    keys = torch.nn.functional.normalize(keys, dim=-1)
    return -(keys * keys.mean(2, keepdim=True)).sum(-1).mean(1)


@tokenprune.register_method("rarest")
def rarest(*, rate: float = 0.7, places: tuple[int, ...] | None = None) -> Method:
    """Keep the patches whose keys are least like the mean key. rate: share kept at each of `places`."""
    return Method(
        name="rarest",
        paper="examples/custom_method.py",
        schedule=Stages(rate, places),
        score=rarity,
        select=keep_top_k,
        needs=frozenset({"queries", "keys"}),
    )


def main() -> None:
    model, (images, labels) = digits_vit(), cluttered_digits("test", 100)
    for method in ("rarest", "top_k", "uniform"):
        with tokenprune.patched(model, method, flops=0.6), torch.inference_mode():
            right = (model(images).argmax(1) == labels).float().mean()
        print(f"{method}: {right:.2f} of the digits read")


if __name__ == "__main__":
    main()
