"""From the coarsest level of the pyramid to the finest that pays, tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import BudgetError, TokenPruneError
from tokenprune.lvlm.host import Crops, LvlmHost
from tokenprune.pyramid.focus import Focus, Seen
from tokenprune.pyramid.levels import Box, Level, Tile, pyramid, tiles_under, tokens_of
from tokenprune.pyramid.prompt import Prompt
from tokenprune.pyramid.regions import Regions, read_tiles, read_whole
from tokenprune.schedule import kept_count
from tokenprune.selection.top_k import ranked


@dataclass(frozen=True)
class Step:
    """A level that was looked at. tiles: (row, column) of those that were encoded, boxes: what they show, in pixels of
    the image. tokens: how many there were; kept: (row, column) of those with the highest importance."""

    level: Level
    tiles: list[Tile]
    boxes: list[Box]
    tokens: int
    kept: list[Tile]


@dataclass(frozen=True)
class Settings:
    """share: of a level's tokens that is kept, or leads to the next level. max_tiles: encoded of a level. shrink: by
    how much the sides of a tile's grid of tokens are shrunk. batch: tiles that are read and encoded at once. mean, std:
    of the normalisation."""

    share: float
    max_tiles: int
    shrink: int
    batch: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Walk:
    """image: [n, C] the tokens that the language model gets, with separators. steps: of the levels, coarsest first."""

    image: Tensor
    steps: list[Step]


@torch.no_grad()
def walk(host: LvlmHost, crops: Crops, prompt: Prompt, regions: Regions, focus: Focus, settings: Settings) -> Walk:
    """Look at an image from coarse to fine (section 3 of the paper).

    Raises:
        BudgetError: the coarsest level has more than max_tiles tiles.
    """
    levels = pyramid(regions.size, crops.side)
    if levels and len(levels[0].tiles()) > settings.max_tiles:
        raise BudgetError(
            f"max_tiles={settings.max_tiles}, but the coarsest level has {levels[0].rows} x {levels[0].columns} tiles,"
            f" which are all encoded; use max_tiles={len(levels[0].tiles())} or more"
        )
    pixels = read_whole(regions, crops.side, settings.mean, settings.std)
    small = _encode(host, crops, pixels, settings.shrink)[0]
    steps: list[Step] = []
    if not levels:
        return Walk(small, steps)
    tiles = levels[0].tiles()
    for level, finer in zip(levels, [*levels[1:], None], strict=True):
        features = _read_and_encode(host, crops, regions, level, tiles, settings)
        grid = round(features.shape[1] ** 0.5)
        tokens = tokens_of(level, tiles, grid)
        number = {tile: i for i, tile in enumerate(tiles)}
        flat = [number[r // grid, c // grid] * grid * grid + r % grid * grid + c % grid for r, c in tokens]
        image, places = _in_rows(features.flatten(0, 1)[flat], tokens, crops.separator)
        start = len(prompt.before) + len(small)
        seen = Seen(
            host,
            prompt.around(torch.cat([small, image])),
            torch.arange(len(prompt.before), start, device=small.device),
            start + places,
            tokens,
            grid,
            level,
            regions.size,
        )
        order = ranked(_importance(focus, seen).unsqueeze(0))[0]
        best = order[: kept_count(settings.share, len(tokens))].sort().values
        kept = [tokens[i] for i in best.tolist()]
        steps.append(Step(level, tiles, [level.box(tile, regions.size) for tile in tiles], len(tokens), kept))
        tiles = tiles_under(kept, level, finer, grid) if finer is not None else []
        if finer is None or len(tiles) > settings.max_tiles:
            break
    stays = torch.ones(len(image), dtype=torch.bool, device=image.device)
    stays[places] = False
    stays[places[best]] = True
    return Walk(torch.cat([small, image[stays]]), steps)


def _importance(focus: Focus, seen: Seen) -> Tensor:
    scores = focus(seen)
    if not isinstance(scores, Tensor) or scores.shape != (len(seen.tokens),):
        given = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise TokenPruneError(f"the focus returned {given}; an importance of each token is [{len(seen.tokens)}]")
    if bool(scores.isnan().any()):
        raise TokenPruneError(
            f"the focus returned NaN for {int(scores.isnan().sum())} of {len(scores)} tokens; an importance is a number"
        )
    return scores.to(seen.places.device)


def _read_and_encode(
    host: LvlmHost, crops: Crops, regions: Regions, level: Level, tiles: Sequence[Tile], settings: Settings
) -> Tensor:
    """[T, n, C] of tiles, of which no more than `batch` are held as pixels."""
    parts = []
    for start in range(0, len(tiles), settings.batch):
        pixels = read_tiles(regions, level, tiles[start : start + settings.batch], settings.mean, settings.std)
        parts.append(_encode(host, crops, pixels, settings.shrink))
    return torch.cat(parts)


def _encode(host: LvlmHost, crops: Crops, pixels: Tensor, shrink: int) -> Tensor:
    """[T, n, C] of the language model's tokens of crops, their grids shrunk by bilinear interpolation."""
    weight = next(host.tower.parameters())
    pixels = pixels.to(weight.dtype)  # of an offloaded tower the device is not known, and its hooks move the pixels
    features = crops.encode(pixels if weight.is_meta else pixels.to(weight.device))
    if shrink == 1:
        return features
    side = round(features.shape[1] ** 0.5)
    if shrink > side:
        raise BudgetError(
            f"shrink={shrink} of a tile's {side} x {side} tokens would leave less than one; use shrink={side} or less"
        )
    maps = features.transpose(1, 2).reshape(len(features), -1, side, side)
    small = torch.nn.functional.interpolate(maps, (-(-side // shrink),) * 2, mode="bilinear", align_corners=False)
    return small.flatten(2).transpose(1, 2)


def _in_rows(features: Tensor, tokens: Sequence[Tile], separator: Tensor | None) -> tuple[Tensor, Tensor]:
    """(tokens [n, C] with a separator behind each row of them, places of the tokens in that)."""
    if separator is None:
        return features, torch.arange(len(features), device=features.device)
    ends = [i for i, (row, _) in enumerate(tokens) if i + 1 == len(tokens) or tokens[i + 1][0] != row]
    before = torch.tensor([row for row, _ in tokens])
    places = (torch.arange(len(tokens)) + torch.unique_consecutive(before, return_inverse=True)[1]).to(features.device)
    image = separator.to(features).expand(len(tokens) + len(ends), -1).index_copy(0, places, features)
    return image, places
