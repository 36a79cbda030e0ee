"""A mask of what words of a prompt are about, from the cross-attention of a denoiser, for `region`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.attention_record import CrossAttention
from tokenprune.denoisers.host import BlockFacts, DenoiserHost
from tokenprune.denoisers.records import grid_of, split_heads
from tokenprune.denoisers.run import guidance_copies
from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.family import active_patches
from tokenprune.registry import families

_SIGMA = 0.5


class AttentionMask:
    """What the image tokens paid the words in the forwards seen, one map for each size of grid."""

    def __init__(self, host: DenoiserHost, words: tuple[int, ...]) -> None:
        self.host = host
        self.words = words
        self.maps: dict[tuple[int, int], list[Tensor]] = {}
        self.latents: tuple[int, int] | None = None
        self.copies = 1
        self.caught: dict[str, Tensor | None] = {}

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: a forward starts."""
        latents: Tensor = {**dict(zip(self.host.arguments, args, strict=False)), **kwargs}[self.host.latents]
        self.latents = tuple(latents.shape[-2:]) if latents.ndim == 4 else None  # type: ignore[assignment]
        # Images from the same noise are copies too, but no parts of guidance.
        copies = guidance_copies(latents[:, : self.host.channels])
        self.copies = next((parts for parts in (2, 3) if copies % parts == 0), 1)

    def catch(self, kind: str) -> Callable[[nn.Module, Any, Tensor], None]:
        """Hook on a projection."""

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self.caught[kind] = output.detach().clone()

        return keep

    def enter(self, facts: BlockFacts) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        """Hook: a block starts."""

        def bind(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            assert facts.cross is not None
            bound = {**dict(zip(facts.arguments, args, strict=False)), **kwargs}
            self.caught = {"bias": None if facts.cross.bias is None else bound.get(facts.cross.bias)}

        return bind

    def leave(self, facts: BlockFacts) -> Callable[[nn.Module, Any, Any], None]:
        """Hook: it has ended."""

        def add(module: nn.Module, args: Any, output: Any) -> None:
            queries, keys = self.caught.get("queries"), self.caught.get("keys")
            assert facts.cross is not None
            if queries is None or keys is None:
                raise TokenPruneError(f"{facts.name}: its cross-attention puts out no queries and keys (fused?)")
            heads, bias = facts.cross.heads, self.caught["bias"]
            q, k = split_heads(queries, heads), split_heads(keys, heads)
            grid = grid_of(self.latents, q.shape[2])
            if grid is None:
                raise TokenPruneError(f"{facts.name}: {q.shape[2]} tokens fill no grid of the latents {self.latents}")
            if max(self.words) >= k.shape[2]:
                raise TokenPruneError(f"words={self.words}: the text has {k.shape[2]} tokens, counted from 0")
            paid = CrossAttention(q, k, facts.cross.scale, None if bias is None else bias.unsqueeze(1)).attention()
            paid = paid[..., list(self.words)].sum(-1).chunk(self.copies)[-1]  # diffusers puts the prompt's half last
            self.maps.setdefault(grid, []).append(paid.mean((0, 1)).view(grid))

        return add

    def attention(self) -> Tensor:
        """The smoothed map [rows, columns] of the words, mean over heads, blocks, forwards and images, on the grid
        whose size is nearest to a quarter of the latents' sides.

        Raises:
            TokenPruneError: no forward was seen.
        """
        if not self.maps or self.latents is None:
            raise TokenPruneError("no forward was seen: run the pipeline, a step or more, inside of the with block")
        wanted = math.prod(-(-side // 4) for side in self.latents)
        grid = min(self.maps, key=lambda grid: (abs(math.log(math.prod(grid) / wanted)), grid))
        plane = torch.stack(self.maps[grid]).mean(0)
        line = torch.exp(-torch.tensor([-1.0, 0.0, 1.0], device=plane.device).square() / (2 * _SIGMA**2))
        kernel = torch.outer(line, line)
        padded = functional.pad(plane[None, None], (1, 1, 1, 1), mode="reflect")
        return functional.conv2d(padded, (kernel / kernel.sum())[None, None])[0, 0]

    def mask(self, share: float = 0.1) -> Tensor:
        """A mask [H, W] of the latents' size, 1 where the words' attention is among the highest `share` of the grid.

        Raises:
            TokenPruneError: a share outside of (0, 1), or no forward was seen.
        """
        if not 0.0 < share < 1.0:
            raise TokenPruneError(f"share={share}: which share of the image the mask covers, in (0, 1)")
        attention = self.attention()
        chosen = (attention >= torch.quantile(attention.flatten(), 1 - share)).float()
        return functional.interpolate(chosen[None, None], self.latents)[0, 0]


@contextmanager
def mask_from_attention(target: object, words: Sequence[int]) -> Iterator[AttentionMask]:
    """Watches the cross-attention of an unpatched denoiser, and gives a mask of where the prompt's `words` are.

    As LEDITS++ derives its first mask (Brack et al., "LEDITS++: Limitless Image Editing using Text-to-Image Models",
    CVPR 2024, section 4.2): the attention that image tokens pay to the words, smoothed and cut at a quantile.

        with mask_from_attention(pipe, words=[2]) as seen:  # the prompt's third token
            pipe(prompt, num_inference_steps=4)
        tokenprune.patch(pipe, "region", mask=seen.mask(share=0.1))

    target: a pipeline with a `unet` or a `transformer`, or one of these. words: positions among the text tokens, that
    of the start token 0. Under guidance in one batch the half with the prompt counts, which diffusers puts last; the
    images of a batch share one mask, as in `region`.

    Raises:
        UnsupportedModel: no denoiser with cross-attention is there.
        TokenPruneError: it is patched, or `words` is empty.
    """
    words = tuple(words)
    if not words or min(words) < 0:
        raise TokenPruneError(f"words={words}: positions of one text token or more, counted from 0")
    model, host = _described(target)
    if active_patches(model):
        raise TokenPruneError("the model is patched, and tokens are missing in its maps; tokenprune.unpatch it first")
    blocks = [block for stack in host.stacks for block in stack.blocks if block.cross is not None]
    if not blocks:
        raise UnsupportedModel(f"{type(model).__name__} has no cross-attention; give region a mask of your own")
    seen = AttentionMask(host, words)
    handles = [model.register_forward_pre_hook(seen.begin, with_kwargs=True)]
    try:
        for facts in blocks:
            assert facts.cross is not None
            handles.append(facts.module.register_forward_pre_hook(seen.enter(facts), with_kwargs=True))
            for kind, module in (("queries", facts.cross.queries), ("keys", facts.cross.keys)):
                if module is not None:
                    handles.append(module.register_forward_hook(seen.catch(kind)))
            handles.append(facts.module.register_forward_hook(seen.leave(facts)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _described(target: object) -> tuple[nn.Module, DenoiserHost]:
    for candidate in (target, getattr(target, "unet", None), getattr(target, "transformer", None)):
        for family in families() if isinstance(candidate, nn.Module) else ():
            model, describe = family.find(candidate), getattr(family, "describe", None)
            if model is not None and describe is not None:
                return model, describe(model)
    raise UnsupportedModel(f"{type(target).__name__} is no denoiser, and has none as `unet` or `transformer`")
