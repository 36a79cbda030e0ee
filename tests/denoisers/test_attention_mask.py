"""Masks from cross-attention against loops over the maps that the host's own unfused processor computes."""

from __future__ import annotations

import math

import pytest
import torch
from denoisers_zoo import build, nothing_is_left, run

import tokenprune
from tokenprune.denoisers.attention_mask import mask_from_attention

torch.set_num_threads(1)


class Storing:
    """diffusers' unfused attention, which keeps the maps [B H, N, T] of cross-attention."""

    def __init__(self, maps):
        self.maps = maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = attn.head_to_batch_dim(attn.to_k(text)), attn.head_to_batch_dim(attn.to_v(text))
        probabilities = attn.get_attention_scores(query, key, None)
        if encoder_hidden_states is not None:
            self.maps.append(probabilities)
        out = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def by_loops(maps, sides, words, share, first_image, batch, quarter):
    """The mask as nested lists; of the maps those of rows x columns tokens nearest to `quarter` many."""
    counts = sorted({one.shape[1] for one in maps}, key=lambda n: abs(math.log(n / quarter)))
    used = [one for one in maps if one.shape[1] == counts[0]]
    rows = sides[0] * math.isqrt(counts[0] * sides[1] // sides[0]) // sides[1]
    columns = counts[0] // rows
    plane = [[0.0] * columns for _ in range(rows)]
    for one in used:
        heads = one.shape[0] // batch
        images = range(first_image, batch)
        for image in images:
            for head in range(heads):
                for n in range(counts[0]):
                    paid = sum(one[image * heads + head, n, word].item() for word in words)
                    plane[n // columns][n % columns] += paid / heads / len(images) / len(used)
    weights = [[math.exp(-(dy * dy + dx * dx) / (2 * 0.25)) for dx in (-1, 0, 1)] for dy in (-1, 0, 1)]
    total = sum(map(sum, weights))

    def reflect(i, n):
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    smooth = [
        sum(
            weights[dy + 1][dx + 1] / total * plane[reflect(y + dy, rows)][reflect(x + dx, columns)]
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        )
        for y in range(rows)
        for x in range(columns)
    ]
    chosen = sorted(range(len(smooth)), key=lambda i: -smooth[i])[: math.ceil(share * (len(smooth) - 1))]
    mask = torch.zeros(sides)
    for y in range(sides[0]):
        for x in range(sides[1]):
            mask[y, x] = float((y * rows // sides[0]) * columns + x * columns // sides[1] in chosen)
    return mask


@pytest.mark.parametrize(("name", "words"), [("unet_sd", (1,)), ("unet_sdxl", (2, 3)), ("pixart", (0, 4))])
def test_masks_are_those_of_the_maps(name, words):
    model, inputs = build(name)
    x = inputs(3, 16, 8)
    with mask_from_attention(model, words) as seen:
        plain = run(model, x)
    assert nothing_is_left(model)
    sides = seen.latents
    maps = []
    for module in model.modules():
        if type(module).__name__ == "Attention":
            module.set_processor(Storing(maps))
    torch.testing.assert_close(run(model, x), plain, rtol=1e-3, atol=1e-3)
    quarter = math.ceil(sides[0] / 4) * math.ceil(sides[1] / 4)
    for share in (0.1, 0.4):
        expected = by_loops(maps, sides, words, share, 0, 3, quarter)
        assert 0 < expected.sum() < expected.numel()
        assert torch.equal(seen.mask(share), expected)


def test_of_guidance_the_prompts_half_counts():
    model, inputs = build("unet_sd")
    x = inputs(1, 16, 16)
    text = torch.cat([x["encoder_hidden_states"], x["encoder_hidden_states"].flip(1)])
    twice = {**x, "sample": x["sample"].repeat(2, 1, 1, 1), "encoder_hidden_states": text}
    with mask_from_attention(model, [1]) as both:
        run(model, twice)
    with mask_from_attention(model, [3]) as alone:  # the prompt's half was turned round
        run(model, x)
    torch.testing.assert_close(both.attention(), alone.attention())


def test_all_prompts_count_where_their_images_begin_with_the_same_noise():
    model, inputs = build("unet_sd")
    x = inputs(1, 16, 16)
    first, second = x["encoder_hidden_states"], torch.roll(x["encoder_hidden_states"], 1, 1)
    text = torch.cat([-first, -second, first, second])
    with mask_from_attention(model, [1]) as both:
        run(model, {**x, "sample": x["sample"].repeat(4, 1, 1, 1), "encoder_hidden_states": text})
    each = []
    for words in (first, second):
        with mask_from_attention(model, [1]) as alone:
            run(model, {**x, "encoder_hidden_states": words})
        each.append(alone.attention())
    torch.testing.assert_close(both.attention(), torch.stack(each).mean(0))


def test_region_takes_the_mask():
    model, inputs = build("pixart")
    x = inputs(1, 16, 16)
    with mask_from_attention(model, [1]) as seen:
        run(model, x)
    tokenprune.patch(model, "region", mask=seen.mask(0.2), ring=0)
    for step in (900, 500):
        run(model, {**x, "timestep": torch.full((1,), step)})
    tokens = seen.mask(0.2).view(8, 2, 8, 2).amax((1, 3)).sum().item()
    places = tokenprune.report(model).to_dict()["places"]
    assert {place["tokens_out"] for place in places} == {int(tokens)}


def test_wrong_use_raises_and_leaves_nothing():
    model, inputs = build("unet_sd")
    x = inputs(1, 16, 16)
    for words, match in (((), "words"), ((-1,), "words")):
        with pytest.raises(tokenprune.TokenPruneError, match=match), mask_from_attention(model, words):
            pass
    with pytest.raises(tokenprune.TokenPruneError, match="5 tokens"), mask_from_attention(model, [5]):
        run(model, x)
    with mask_from_attention(model, [1]) as seen, pytest.raises(tokenprune.TokenPruneError, match="no forward"):
        seen.mask()
    with pytest.raises(tokenprune.TokenPruneError, match="share"):
        seen.mask(1.0)
    assert nothing_is_left(model)
    tokenprune.patch(model, "random", keep=0.5)
    with pytest.raises(tokenprune.TokenPruneError, match="patched"), mask_from_attention(model, [1]):
        pass
    flux, _ = build("flux")
    with pytest.raises(tokenprune.UnsupportedModel, match="no cross-attention"), mask_from_attention(flux, [1]):
        pass
    with (
        pytest.raises(tokenprune.UnsupportedModel, match="no denoiser"),
        mask_from_attention(torch.nn.Linear(1, 1), [1]),
    ):
        pass
