"""A prompt about one image, as embeddings into which tokens of the image are put."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import registry
from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.family import active_patches, composes
from tokenprune.lvlm.host import Crops, LvlmHost


@dataclass(frozen=True)
class Prompt:
    """before, after: [T, C] embeddings of the text around the image."""

    before: Tensor
    after: Tensor

    def around(self, image: Tensor) -> Tensor:
        """[1, L, C] with the image's tokens [n, C] in it."""
        return torch.cat([self.before, image.to(self.before), self.after]).unsqueeze(0)


def host_of(model: nn.Module) -> tuple[LvlmHost, Crops]:
    """The facts of a vision-language model whose images may be cut into tiles.

    Raises:
        UnsupportedModel: it is none, or they may not, or it is patched itself.
    """
    model = getattr(model, "_orig_mod", model)
    for family in registry.families():
        found = family.find(model) if hasattr(family, "describe") else None
        if found is None:
            continue
        host: LvlmHost = family.describe(found)  # type: ignore[attr-defined]
        name = type(host.outer).__name__
        if isinstance(host.crops, str):
            raise UnsupportedModel(
                f"an image of {name} cannot be cut into tiles: {host.crops}; Llava, LlavaNext, LlavaOnevision,"
                " InternVL, Idefics3 and SmolVLM can"
            )
        if host.layer is None:
            raise UnsupportedModel(f"layers of the language model of {name} differ in what they attend to")
        if any(composes(patch) for patch in active_patches(found).values()):
            raise UnsupportedModel(
                f"{name} is patched, and coarse_to_fine chooses its tokens itself; tokenprune.unpatch(model) first"
                " (a patch of its image tower alone may stay)"
            )
        return host, host.crops()
    raise UnsupportedModel(
        f"{type(model).__name__} is no vision-language model that is known; coarse_to_fine works on transformers'"
        " Llava, LlavaNext, LlavaOnevision, InternVL, Idefics3 and SmolVLM"
    )


def prompt_of(host: LvlmHost, crops: Crops, question: str | Tensor, processor: Any) -> Prompt:
    """The prompt of a question: text, put into the processor's chat template behind an image, or token ids [1, T] in
    which placeholders of one image stand side by side.

    Raises:
        TokenPruneError: it has no place for an image, or for several.
    """
    ids = question if isinstance(question, Tensor) else _ids(crops, question, processor)
    embeddings: Any = host.model.get_input_embeddings()  # type: ignore[operator]
    where = (ids[0] == host.tokens["image"]).nonzero().flatten()
    if len(ids) != 1 or not len(where):
        raise TokenPruneError(
            f"the prompt, token ids {list(ids.shape)}, is to be of one sample with placeholders"
            f" ({host.tokens['image']}) of one image; {len(where)} were found"
        )
    if isinstance(question, Tensor):
        _check_one_image(where, crops)
    device = embeddings.weight.device
    rows: Tensor = embeddings(ids if device.type == "meta" else ids.to(device))[0].detach()
    return Prompt(rows[: int(where[0])], rows[int(where[-1]) + 1 :])


def _check_one_image(where: Tensor, crops: Crops) -> None:
    first, last, count = int(where[0]), int(where[-1]), len(where)
    if last - first + 1 != count:
        raise TokenPruneError(
            f"the prompt's {count} placeholders, of tokens {first} to {last}, are not side by side, as they are of one"
            " image; coarse_to_fine puts one image in their place: ask about each by itself, and give the question as"
            " text where the placeholders of one image have markers between them"
        )
    if crops.tokens is not None and count > crops.tokens:
        raise TokenPruneError(
            f"the prompt has {count} placeholders, and one image of this model has {crops.tokens}; coarse_to_fine puts"
            " one image in their place: ask about each by itself"
        )


def _ids(crops: Crops, question: str, processor: Any) -> Tensor:
    from PIL import Image

    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    small = Image.new("RGB", (crops.side, crops.side))
    ids: Tensor = processor(images=[small], text=[text], return_tensors="pt")["input_ids"]
    return ids
