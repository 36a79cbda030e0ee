"""Very large images: the levels and tiles are those of a loop written by hand, and never are all of them held."""

from __future__ import annotations

import copy
import math
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lvlm_zoo import IMAGE, KINDS, Processor, build, language_model
from PIL import Image
from torch import Tensor, nn

import tokenprune
from tokenprune.pyramid import FirstLayers, FocusModule, Seen, distill
from tokenprune.pyramid.distill import focus_loss
from tokenprune.pyramid.levels import pyramid, tiles_under, tokens_of

SIDE = 56
IDS = torch.tensor([[1, 5, IMAGE, IMAGE, 20, 31, 42, 7]])


class Drawn:
    """An image of any size, drawn where it is looked at."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.reads: list[tuple[Any, tuple[int, int]]] = []

    def read(self, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
        left, upper, right, lower = box
        assert 0 <= left < right <= self.size[0]
        assert 0 <= upper < lower <= self.size[1]
        self.reads.append((box, size))
        x = left + (np.arange(size[0]) + 0.5) * (right - left) / size[0]
        y = (upper + (np.arange(size[1]) + 0.5) * (lower - upper) / size[1])[:, None]
        waves = [np.sin(x / 310 + y / 170), np.cos(x / 97 - y / 410), np.sin(x * y / 9e5)]
        return np.stack([127 + 120 * wave for wave in waves], -1).astype(np.uint8)


def near(point: tuple[float, float]) -> Callable[[Seen], Tensor]:
    """A focus by hand: the nearer a token is to a point of the image, given as shares of its sides, the more."""

    def focus(seen: Seen) -> Tensor:
        cell = seen.level.side / seen.grid
        x = torch.tensor([(c + 0.5) * cell / seen.level.width for _, c in seen.tokens]) - point[0]
        y = torch.tensor([(r + 0.5) * cell / seen.level.height for r, _ in seen.tokens]) - point[1]
        return -(x.square() + y.square())

    return focus


def ask(model: nn.Module, image: Any, **options: Any) -> Any:
    return tokenprune.coarse_to_fine(
        model, image, IDS, processor=Processor(), max_new_tokens=3, do_sample=False, **options
    )


def test_the_papers_pyramid() -> None:
    assert [(level.rows, level.columns) for level in pyramid((10000, 10000), 336)] == [
        (4, 4),
        (8, 8),
        (15, 15),
        (30, 30),
    ]
    assert [level.halvings for level in pyramid((2015, 700), 336)] == [0]
    assert [level.halvings for level in pyramid((2016, 700), 336)] == [1, 0]
    assert pyramid((336, 200), 336) == []


@pytest.mark.parametrize("size", [(2688, 5377), (5376, 2689), (673, 5376), (10752, 5379)])
def test_every_tile_shows_something(size: tuple[int, int]) -> None:
    """Also where halving leaves less than half a pixel of the image for the last tiles."""
    for level in pyramid(size, 336):
        for tile in level.tiles():
            assert min(level.content(tile)) >= 1
            left, upper, right, lower = level.box(tile, size)
            assert left < right
            assert upper < lower


@pytest.mark.parametrize("size", [(10000, 10000), (7001, 2503), (1009, 5000), (340, 337)])
def test_tokens_lie_in_the_tiles_below_them(size: tuple[int, int]) -> None:
    levels = pyramid(size, 336)
    for level, finer in pairwise(levels):
        for row, column in tokens_of(level, level.tiles(), 12)[:: 7 if max(size) < 9000 else 1]:
            (tile,) = tiles_under([(row, column)], level, finer, 12)
            left, upper, right, lower = finer.box(tile, size)
            x, y = column * 28 / level.width * size[0], row * 28 / level.height * size[1]
            assert left - 1e-6 <= x < right
            assert upper - 1e-6 <= y < lower
            if size[0] == size[1]:  # without padding it is the paper's formula
                share = finer.rows / (level.rows * 12)
                assert tile == (math.floor(row * share + 1e-9), math.floor(column * share + 1e-9))
        # none is out of reach, but slivers at the border that are narrower than a token of this level
        under = tiles_under(tokens_of(level, level.tiles(), 12), level, finer, 12)
        stretch = 28 * finer.width / level.width
        assert under == [tile for tile in finer.tiles() if min(finer.content(tile)) >= stretch or tile in under]


def by_hand(
    model: Any, image: Drawn, point: tuple[float, float], share: float, most: int
) -> tuple[list[Any], list[Tensor], Tensor]:
    """(tiles of each level, its tokens row by row behind those of the small image, the prompt's embeddings), out of the
    model's own parts, one tile after the other."""
    width, height = image.size
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))

    def encode(box: Any, w: int, h: int) -> Tensor:
        square = torch.zeros(3, SIDE, SIDE)
        square[:, :h, :w] = torch.from_numpy(image.read(box, (w, h))).permute(2, 0, 1) / 255
        (features,) = model.model.get_image_features(((square - mean) / std)[None], return_dict=True).pooler_output
        grid = features.T.reshape(1, -1, 4, 4)
        return nn.functional.avg_pool2d(grid, 2)[0].permute(1, 2, 0)  # bilinear to half the size is the mean of four

    scales = [2**p for p in range(20) if p == 0 or max(width, height) / 2**p >= 3 * SIDE][::-1]
    visited, levels, tiles, found = [], [], None, {}
    small = encode((0, 0, width, height), SIDE, SIDE).flatten(0, 1)
    for at, scale in enumerate(scales):
        rows, columns = math.ceil(height / scale / SIDE), math.ceil(width / scale / SIDE)
        ratio = min(rows * SIDE / (height / scale), columns * SIDE / (width / scale))
        w, h = round(width / scale * ratio), round(height / scale * ratio)
        tiles = [(r, c) for r in range(rows) for c in range(columns)] if tiles is None else tiles
        visited.append(tiles)
        found = {}
        for r, c in tiles:
            across, down = min(SIDE, w - c * SIDE), min(SIDE, h - r * SIDE)
            left, upper = c * SIDE * width / w, r * SIDE * height / h
            box = (left, upper, min(width, left + across * width / w), min(height, upper + down * height / h))
            part = encode(box, across, down)
            for i in (0, 1):
                for j in (0, 1):
                    if i * 28 < down and j * 28 < across:
                        found[2 * r + i, 2 * c + j] = part[i, j]

        levels.append(torch.cat([small, torch.stack([found[token] for token in sorted(found)])]))

        def distance(token: tuple[int, int], w: int = w, h: int = h) -> float:
            return ((token[1] + 0.5) * 28 / w - point[0]) ** 2 + ((token[0] + 0.5) * 28 / h - point[1]) ** 2

        best = sorted(sorted(found), key=distance)[: math.ceil(share * len(found))]
        if at + 1 == len(scales):
            break
        finer = scales[at + 1]
        down, across = math.ceil(height / finer / SIDE), math.ceil(width / finer / SIDE)
        ratio = min(down * SIDE / (height / finer), across * SIDE / (width / finer))
        next_w, next_h = round(width / finer * ratio), round(height / finer * ratio)
        under = {(math.floor(r * 28 / h * next_h / SIDE), math.floor(c * 28 / w * next_w / SIDE)) for r, c in best}
        if len(under) > most:
            break
        tiles = sorted(under)
    ids = model.get_input_embeddings()(IDS[0])
    return visited, levels, torch.cat([ids[:2], small, torch.stack([found[t] for t in sorted(best)]), ids[4:]])[None]


@pytest.mark.parametrize(
    ("size", "share", "most", "deep"),
    [((10000, 10000), 0.08, 40, 6), ((3000, 7777), 0.12, 40, 6), ((2000, 500), 0.5, 10, 1)],
)
@torch.no_grad()
def test_levels_and_tokens_are_those_of_a_loop_by_hand(size: Any, share: float, most: int, deep: int) -> None:
    model, image, point = build("llava"), Drawn(*size), (0.311, 0.647)
    shown: list[Tensor] = []

    def focus(seen: Seen) -> Tensor:
        shown.append(seen.embeds[0, torch.cat([seen.small, seen.places])])
        return near(point)(seen)

    answer = ask(model, image, focus=focus, share=share, max_tiles=most)
    visited, levels, embeds = by_hand(model, Drawn(*size), point, share, most)
    assert [step.tiles for step in answer.steps] == visited
    for step, mine, expected in zip(answer.steps, shown, levels, strict=True):
        assert mine.shape == expected.shape
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert step.tokens == len(expected) - 4
    assert len(visited) == deep
    assert answer.tiles == 1 + sum(map(len, visited)) == len(image.reads)
    assert [box for step in answer.steps for box in step.boxes] == [box for box, _ in image.reads[1:]]
    assert (answer.embeds - embeds).abs().max() <= 1e-5 * embeds.abs().max()
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    expected = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer.sequences, expected)
    assert answer.text == " ".join(map(str, expected[0].tolist()))


def test_as_many_tiles_as_allowed_are_looked_at() -> None:
    model, image, focus = build("llava"), Drawn(1500, 900), near((0.3, 0.6))
    counts = [len(step.tiles) for step in ask(model, image, focus=focus, share=0.4).steps]
    assert counts == sorted(set(counts))
    for allowed, looked_at in ((counts[-1], counts), (counts[-1] - 1, counts[:-1])):
        steps = ask(model, image, focus=focus, share=0.4, max_tiles=allowed).steps
        assert [len(step.tiles) for step in steps] == looked_at


def test_a_hundred_million_pixels_are_never_held() -> None:
    model, image = build("llava"), Drawn(10000, 10000)
    batches: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kw: batches.append(len(args[0])), with_kwargs=True
    )
    prompts: list[int] = []
    text = language_model(model)
    text.register_forward_pre_hook(lambda _, args, kw: prompts.append(kw["inputs_embeds"].shape[1]), with_kwargs=True)
    tracemalloc.start()
    answer = ask(model, image, focus=near((0.9, 0.1)), share=0.08)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    everything = sum(len(level.tiles()) for level in pyramid(image.size, SIDE))
    assert everything > 40_000
    assert sum(batches) == answer.tiles <= 1 + 36 + 5 * 40
    assert max(batches) <= 8
    assert max(prompts) <= 200
    assert peak < 4 * 2**20  # of what Python and numpy hold; the tiles of the finest level alone are 300 MB as bytes
    boxes = answer.steps[-1].boxes
    assert all(left <= 9500 and right >= 8500 for left, _, right, _ in boxes)


@pytest.mark.parametrize("rotary", [True, False])
@torch.no_grad()
def test_the_first_layers_look_as_the_model_attends(rotary: bool) -> None:
    """With rotary embedding it is the eager model's own attention map, its row over the level's tokens."""
    model, seen = build("llava", "eager"), []
    focus = FirstLayers(layer=2, rotary=rotary)

    def look(one: Seen) -> Tensor:
        seen.append(one)
        return focus(one)

    ask(model, Drawn(400, 700), focus=look)
    one = seen[0]
    text = language_model(model)
    out = text(inputs_embeds=one.embeds, output_attentions=True, output_hidden_states=True, use_cache=False)
    row = out.attentions[2][0, :, -1, one.places]
    if not rotary:
        attention = text.layers[2].self_attn
        x = text.layers[2].input_layernorm(out.hidden_states[2][0])
        q, k = attention.q_proj(x[-1]).view(4, 8), attention.k_proj(x[one.places]).view(-1, 2, 8)
        row = torch.einsum("hd,nhd->hn", q, k.repeat_interleave(2, 1)) / 8**0.5
        row = row.softmax(-1)
    expected = (row / row.sum(-1, keepdim=True)).mean(0)
    assert (focus(one) - expected).abs().max() <= 1e-5 * expected.max()
    assert torch.equal(FirstLayers()(one), FirstLayers(layer=0)(one))  # before a quarter of four layers
    assert not text._forward_pre_hooks
    assert not any(layer._forward_pre_hooks for layer in text.layers)


@pytest.mark.parametrize("name", ["llava", "llava_next", "onevision", "internvl", "idefics3", "smolvlm"])
@torch.no_grad()
def test_families(name: str) -> None:
    """A crop is encoded as the model encodes it, and rows of tokens end in the model's separator."""
    model, image = build(name), Drawn(300, 160)
    projected: list[Tensor] = []
    inner = model.model
    projector = getattr(inner, "multi_modal_projector", None) or inner.connector
    hook = projector.register_forward_hook(lambda _, args, out: projected.append(out))
    answer = ask(model, image, focus=lambda seen: torch.arange(len(seen.tokens)).float(), share=0.5, shrink=1)
    mine = torch.cat(projected)
    projected.clear()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    pixels = torch.zeros(len(image.reads), 3, SIDE, SIDE)
    for square, (box, (w, h)) in zip(pixels, list(image.reads), strict=True):
        square[:, :h, :w] = torch.from_numpy(image.read(box, (w, h))).permute(2, 0, 1) / 255
    pixels = (pixels - mean) / std
    if "image_sizes" in KINDS[name].pixels([(56, 56)]):  # an image of one column, as this model cuts it: small, and two
        for part in (*pixels[:18].view(6, 3, 3, SIDE, SIDE), pixels[16:]):
            inner.get_image_features(part[None], image_sizes=torch.tensor([[112, 56]]))
        expected = torch.cat([*projected[:-1], projected[-1][2:]])
    elif name in ("idefics3", "smolvlm"):
        inner.get_image_features(pixels[None])
        expected = projected[0]
    else:
        inner.get_image_features(pixels)
        expected = projected[0]
    hook.remove()
    assert mine.shape == expected.shape
    assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
    (step,) = answer.steps
    assert step.kept == sorted(tokens_of(step.level, step.tiles, round(mine.shape[1] ** 0.5)))[-len(step.kept) :]
    separator = getattr(inner, "image_newline", None)
    rows = {row for row, _ in tokens_of(step.level, step.tiles, round(mine.shape[1] ** 0.5))}
    assert answer.tokens == mine.shape[1] + len(step.kept) + (len(rows) if separator is not None else 0)
    if separator is not None:
        assert int((answer.embeds[0] == separator).all(-1).sum()) == len(rows)


def test_images_and_questions() -> None:
    model = build("llava")
    drawn = Drawn(300, 200)
    picture = Image.fromarray(drawn.read((0, 0, 300, 200), (300, 200)))
    answer = tokenprune.coarse_to_fine(model, picture, "where is it", processor=Processor(), max_new_tokens=2)
    assert len(answer.steps) == 1
    tiny = ask(model, picture.resize((50, 40)))
    assert (tiny.steps, tiny.tiles, tiny.tokens) == ([], 1, 4)
    with pytest.raises(tokenprune.TokenPruneError, match="read"):
        ask(model, torch.zeros(3, 300, 200))
    with pytest.raises(tokenprune.TokenPruneError, match="placeholders"):
        tokenprune.coarse_to_fine(model, picture, torch.tensor([[1, 2]]), processor=Processor())


@torch.no_grad()
def test_a_crops_register_tokens_do_not_go_on() -> None:
    """They belong to no place of the crop's grid."""
    config = copy.deepcopy(build("llava").config)
    config.vision_config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=14,
        num_register_tokens=4,
    )
    model: Any = transformers.LlavaForConditionalGeneration(config).eval()
    projected: list[Tensor] = []
    model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: projected.append(out))
    answer = ask(model, Drawn(300, 160), shrink=1)
    assert projected[0].shape[1] == 20
    assert torch.equal(answer.embeds[0, 2:18], projected[0][0, 4:])
    assert answer.tokens == 16 + len(answer.steps[0].kept)


def test_ids_of_two_images_are_refused() -> None:
    image = Drawn(300, 200)
    apart, side_by_side = [1, 5, IMAGE, IMAGE, 20, IMAGE, IMAGE, 31], [1, 5, *[IMAGE] * 32, 31]
    for name, ids in (("llava", apart), ("llava", side_by_side), ("llava_next", apart), ("idefics3", apart)):
        with pytest.raises(tokenprune.TokenPruneError, match="one image"):
            tokenprune.coarse_to_fine(build(name), image, torch.tensor([ids]), processor=Processor())
    one = torch.tensor([[1, 5, *[IMAGE] * 16, 31]])
    assert tokenprune.coarse_to_fine(build("llava"), image, one, processor=Processor(), max_new_tokens=1).steps


def test_several_answers_and_all_of_the_output() -> None:
    model, image = build("llava"), Drawn(300, 200)
    beams = {"num_beams": 4, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 3}
    answer = tokenprune.coarse_to_fine(
        model, image, IDS, processor=Processor(), return_dict_in_generate=True, output_scores=True, **beams
    )
    mask = torch.ones(answer.embeds.shape[:2], dtype=torch.long)
    expected = model.generate(inputs_embeds=answer.embeds, attention_mask=mask, **beams)
    assert len(expected) == 3
    assert torch.equal(answer.sequences, expected)
    assert answer.texts == [" ".join(map(str, row)) for row in expected.tolist()]
    assert len(set(answer.texts)) == 3
    assert answer.text == answer.texts[0]
    assert len(answer.output.scores) == 3
    assert ask(model, image).output is None


def test_a_path(tmp_path: Any) -> None:
    model, drawn = build("llava"), Drawn(300, 200)
    picture = Image.fromarray(drawn.read((0, 0, 300, 200), (300, 200)))
    picture.save(tmp_path / "image.png")
    assert torch.equal(ask(model, tmp_path / "image.png").embeds, ask(model, picture).embeds)


def test_refusals() -> None:
    image, model = Drawn(600, 600), build("llava")
    for name, reason in (
        ("qwen2_vl", "rows and columns"),
        ("gemma3", "both directions"),
        ("paligemma", "both directions"),
    ):
        with pytest.raises(tokenprune.UnsupportedModel, match=reason):
            ask(build(name), image)
    with pytest.raises(tokenprune.UnsupportedModel, match="no vision-language model"):
        ask(language_model(model), image)
    with pytest.raises(tokenprune.UnsupportedModel, match="generate"):
        ask(model.model, image)
    with pytest.raises(tokenprune.BudgetError, match="max_tiles=16"):
        ask(model, Drawn(224, 224), max_tiles=8)
    with pytest.raises(tokenprune.BudgetError, match=r"shrink must be a whole number of at least 1, got 1\.5"):
        ask(model, image, shrink=1.5)
    with pytest.raises(tokenprune.BudgetError, match=r"shrink=9 of a tile's 4 x 4 tokens .* use shrink=4 or less"):
        ask(model, image, shrink=9)
    with pytest.raises(tokenprune.TokenPruneError, match=r"returned \[1, 576\]"):
        ask(model, image, focus=lambda seen: torch.zeros(1, len(seen.tokens)), shrink=1, max_tiles=40)
    with pytest.raises(tokenprune.TokenPruneError, match="NaN for 1 of"):
        ask(
            model,
            image,
            focus=lambda seen: torch.full((len(seen.tokens),), 1.0).index_fill(0, torch.tensor(0), torch.nan),
        )
    with pytest.raises(tokenprune.TokenPruneError, match="mode I;16"):
        ask(model, Image.new("I;16", (600, 600)))
    with pytest.raises(tokenprune.BudgetError, match="share"):
        ask(model, image, share=0)
    with tokenprune.patched(model, "top_k", keep=0.5), pytest.raises(tokenprune.UnsupportedModel, match="unpatch"):
        ask(model, image)
    whole = ask(model, image)
    with tokenprune.patched(model.model.vision_tower, "tome", keep=0.5):
        assert not torch.equal(ask(model, image).embeds, whole.embeds)


def test_distillation_lowers_its_loss_and_serves_as_focus(tmp_path: Any) -> None:
    """On images and questions that it has not seen it chooses the tokens that the model itself would."""
    model, image = build("llava"), Drawn(400, 500)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    module = FocusModule(model, layers=(1, 3))
    for parameter in module.parameters():
        parameter.data += torch.randn_like(parameter) * parameter.abs().mean()

    def example() -> tuple[Drawn, Tensor]:
        return Drawn(180 + int(torch.randint(150, ())), 250), torch.cat([IDS[:, :4], torch.randint(6, 100, (1, 5))], 1)

    held: list[Seen] = []

    def watch(seen: Seen) -> Tensor:
        held.append(seen)
        return FirstLayers()(seen)

    for unseen, question in [example() for _ in range(4)]:
        tokenprune.coarse_to_fine(
            model, unseen, question, processor=Processor(), focus=watch, max_new_tokens=1, do_sample=False
        )

    @torch.no_grad()
    def agreement() -> float:
        shared = []
        for seen in held:
            share = len(seen.tokens) // 4
            mine, models = (set(f(seen).topk(share).indices.tolist()) for f in (module, FirstLayers(3, rotary=True)))
            shared.append(len(mine & models) / share)
        return sum(shared) / len(shared)

    start = agreement()
    losses = distill(model, module, [example() for _ in range(40)], processor=Processor(), lr=3e-3)
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert agreement() > start + 0.3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    answer = ask(model, image, focus=module)
    module.save(tmp_path / "focus.safetensors")
    again = FocusModule.load(model, tmp_path / "focus.safetensors")
    assert again.picked == (1, 3)
    assert torch.equal(ask(model, image, focus=again).embeds, answer.embeds)
    (tmp_path / "other.safetensors").write_bytes(b"junk")
    with pytest.raises(tokenprune.TokenPruneError, match="no safetensors"):
        FocusModule.load(model, tmp_path / "other.safetensors")


@torch.no_grad()
def test_a_module_of_all_layers_looks_as_the_model_does() -> None:
    """Then module and teacher are one, and the loss is zero; of another one it is the formula."""
    model, image = build("llava"), Drawn(400, 500)
    module = FocusModule(model, layers=(0, 1, 2, 3))
    assert FocusModule(model).picked == (0, 1, 2)
    assert torch.equal(
        ask(model, image, focus=module).embeds, ask(model, image, focus=FirstLayers(3, rotary=True)).embeds
    )
    with torch.enable_grad():
        assert distill(model, module, [(image, IDS)], processor=Processor())[0] <= 1e-6
    torch.manual_seed(0)
    pairs = [[torch.randn(4, 9).mul(3).softmax(-1) for _ in range(2)] for _ in range(2)]
    total = 0.0
    for t, s in pairs:
        for head in range(4):
            a, b = t[head], s[head]
            total += float((a * (a / b).log()).sum())
            a, b = a[3:], b[3:]
            total += float(((a - b) ** 2).mean())
            a, b = a / a.sum(), b / b.sum()
            total += 2 * float((a * (a / b).log()).sum())
    got = float(focus_loss([t for t, _ in pairs], [s for _, s in pairs], 3))
    assert abs(got - total / 8) <= 1e-5
