"""AT-EDM's scores and recovery against loops over the attention maps that the hosts compute."""

from functools import partial

import diffusers
import pytest
import torch
from denoisers_zoo import ZOO, build, run
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune import registry
from tokenprune.attention_record import CrossAttention
from tokenprune.kernels.attention_match import attention_match
from tokenprune.kernels.attention_match.reference import attention_match as naive_match
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.schedule import Stages
from tokenprune.scores.cross_pagerank import cross_pagerank

torch.set_num_threads(1)


@pytest.fixture
def records():
    """The records of a method that keeps all tokens."""
    seen = []

    def keep_all(scores, record, keep):
        if record.hidden.device.type != "meta":  # where the cost is counted
            seen.append(record)
        return Reduction(record.origin)

    needs = frozenset({"queries", "keys", "stacks"})
    registry.register_method("attention_spy")(
        lambda: Method("attention_spy", "test", Stages(0.5), keep_all, needs=needs)
    )
    yield seen
    registry._METHODS.pop("attention_spy")


def attended(monkeypatch, model, inputs):
    """Queries and keys [B, H, N, D] of every attention of a forward, as the host's attention gets them."""
    seen = []
    attention = functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen.append((query, key))
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    run(model, inputs)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("name", sorted(ZOO))
def test_queries_and_keys_are_those_that_the_attention_uses(name, records, monkeypatch):
    model, inputs = build(name)
    x = inputs(2, 16, 12)
    plain = attended(monkeypatch, model, x)
    with pytest.raises(tokenprune.BudgetError) as told:
        tokenprune.patch(model, "attention_spy", schedule={"none": 0.5})
    stacks = str(told.value).split("the model has ")[1].split(", ")
    tokenprune.patch(model, "attention_spy", schedule=dict.fromkeys(stacks, 0.5), steps={})
    run(model, x)
    tokenprune.unpatch(model)
    assert records
    for record in records:
        q, k = record.rotated()
        n = record.tokens
        pairs = [
            (query[:, :, start : start + n], key[:, :, start : start + n])
            for query, key in plain
            for start in {0, query.shape[2] - n}
            if start >= 0 and query.shape[2] == key.shape[2] and query.shape[1] == q.shape[1]
        ]
        copies = 1 if q.shape[0] == pairs[0][0].shape[0] else 2
        q, k = (torch.cat(part.chunk(copies, -1)) for part in (q, k))
        near = [
            torch.allclose(q, query, rtol=1e-4, atol=1e-4) and torch.allclose(k, key, rtol=1e-4, atol=1e-4)
            for query, key in pairs
            if query.shape == q.shape
        ]
        assert any(near), f"{name}: no attention is given these queries and keys"


@pytest.mark.parametrize(("rows", "memory_limit"), [(0, 2**20), (5, 2**20), (13, 700)])
def test_the_attention_match_is_the_argmax_of_the_mean_map(rows, memory_limit):
    g = torch.Generator().manual_seed(rows)
    q, k = (3 * torch.randn(2, 3, n, 4, generator=g) for n in (rows, 17))
    columns = torch.stack([torch.randperm(17, generator=g)[:7] for _ in range(2)])
    found = attention_match(q, k, columns, scale=0.7, memory_limit=memory_limit)
    assert torch.equal(found, naive_match(q, k, columns, scale=0.7))
    log_sums = (q @ k.transpose(2, 3) * 0.7).logsumexp(-1)
    with FlopCounterMode(display=False) as counter:
        shorter = attention_match(q, k, columns, scale=0.7, log_sums=log_sums, memory_limit=memory_limit)
    assert torch.equal(shorter, found)
    assert counter.get_total_flops() == 2 * 2 * 3 * rows * 7 * 4  # the seven columns alone
    # The softmax of each head is over all keys, so that a head whose attention is elsewhere counts little.
    only = (q @ k.gather(2, columns[:, None, :, None].expand(-1, 3, -1, 4)).transpose(2, 3) * 0.7).softmax(-1)
    assert rows < 13 or not torch.equal(found, only.mean(1).argmax(-1))


def test_cross_pagerank_is_the_papers_in_loops():
    g = torch.Generator().manual_seed(0)
    n, t, rounds = 6, 4, 3
    cross = CrossAttention(*(torch.randn(1, 2, m, 3, generator=g) for m in (n, t)), scale=0.5)
    cross.queries[:, :, :, 0], cross.keys[:, :, 0] = 1.0, torch.tensor([6.0, 0.0, 0.0])  # all look at the first word
    scores = cross_pagerank(cross, rounds)
    for h in range(2):
        a = [[0.0] * t for _ in range(n)]
        for i in range(n):
            e = [torch.exp(0.5 * cross.queries[0, h, i] @ cross.keys[0, h, j]).item() for j in range(t)]
            a[i] = [v / sum(e) for v in e]
        weights = []
        for j in range(t):
            column = [a[i][j] for i in range(n)]
            shares = torch.tensor([v / sum(column) for v in column])
            weights.append(1 - (-(shares * shares.log()).sum() / torch.tensor(float(n)).log()).item())
        assert min(weights) == weights[0]
        s = [1 / n] * n
        for _ in range(rounds):
            text = [weights[j] * sum(a[i][j] * s[i] for i in range(n)) for j in range(t)]
            s = [sum(a[i][j] * text[j] for j in range(t)) for i in range(n)]
            s = [v / sum(s) for v in s]
        torch.testing.assert_close(scores[0, h], torch.tensor(s), rtol=1e-3, atol=1e-5)


def test_padded_words_have_no_vote():
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, m, 3, generator=g) for m in (6, 5))
    bias = torch.zeros(1, 1, 1, 5)
    bias[..., 3:] = -10000.0
    masked = cross_pagerank(CrossAttention(q, k, 0.6, bias), 2)
    torch.testing.assert_close(masked, cross_pagerank(CrossAttention(q, k[:, :, :3], 0.6), 2))


def test_the_recovered_tokens_copy_what_the_first_block_attends_to(monkeypatch):
    """The whole of AT-EDM on a U-Net's stack: scores, tokens kept and copies, from the attention map of the host."""
    model, inputs = build("unet_sdxl")
    x = inputs(2, 16, 12)
    tokens, keep = 12, 4
    block = "mid_block.attentions.0"
    q, k = next((q, k) for q, k in attended(monkeypatch, model, x) if q.shape[2] == tokens and q.shape[2] == k.shape[2])
    seen = []
    tokenprune.patch(model, "at_edm", schedule={block: keep / tokens}, steps={})
    hook = model.get_submodule(block).norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stack = model.get_submodule(block)
    last = stack.transformer_blocks[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    run(model, x)
    hook.remove()
    last.remove()
    tokenprune.unpatch(model)
    q, k = next(
        (q, k)
        for q, k in attended(
            monkeypatch, stack, {"hidden_states": seen[0], "encoder_hidden_states": x["encoder_hidden_states"]}
        )
        if q.shape[2] == tokens
    )
    maps = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    for image in range(2):
        received = maps[image].sum(1) / tokens  # one round of votes from a uniform start
        score = received.square().mean(0).sqrt()
        kept = sorted(score.argsort(descending=True)[:keep].tolist())
        output = seen[1][image]
        for token in range(tokens):
            if token not in kept:
                row = maps[image].mean(0)[token]
                copied = max(kept, key=lambda j: row[j].item())
                assert torch.equal(output[token], output[copied])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("at_edm", {"similar_by": "attention"}),
        ("at_edm", {"similar_by": "hidden"}),
        ("at_edm", {"similar_by": "hidden", "attention": "cross", "iterations": 3}),
        ("random", {}),
        ("uniform", {}),
    ],
)
def test_a_token_left_out_gains_what_the_one_most_like_it_gained(method, options):
    """Held to the same stack with copies, whose kept tokens and stand-ins it shares."""
    model, inputs = build("unet_sdxl")
    x = inputs(2, 16, 12)
    block = "mid_block.attentions.0"
    blocks = model.get_submodule(block).transformer_blocks
    seen = {}
    for recover in ("similar", "gain", "residual"):
        tokenprune.patch(model, method, schedule={block: 4 / 12}, steps={}, recover=recover, **options)
        outputs = seen[recover] = []
        keep = partial(lambda into, *args: into.append(args[2]), outputs)
        hooks = [at.register_forward_hook(keep) for at in (blocks[0], blocks[-1])]
        run(model, x)
        for hook in hooks:
            hook.remove()
        tokenprune.unpatch(model)
    entered, copied = seen["similar"]
    assert torch.equal(seen["gain"][0], entered)
    for image in range(2):
        kept = [i for i in range(12) if not torch.equal(seen["residual"][1][image, i], entered[image, i])]
        assert len(kept) == 4
        for token in range(12):
            like = next(j for j in kept if torch.equal(copied[image, token], copied[image, j]))
            gained = copied[image, like] - entered[image, like]
            torch.testing.assert_close(seen["gain"][1][image, token], entered[image, token] + gained)
            assert token in kept or gained.abs().max() > 0.1


def test_cross_attention_chooses_other_tokens_and_needs_text():
    model, inputs = build("unet_sdxl")
    x = inputs(2, 16, 12)
    outputs = []
    for attention in ("self", "cross"):
        tokenprune.patch(model, "at_edm", keep=0.4, steps={}, attention=attention)
        outputs.append(run(model, x))
        tokenprune.unpatch(model)
    assert not torch.equal(*outputs)
    model, _ = build("dit")
    with pytest.raises(tokenprune.UnsupportedMethod, match="no cross-attention"):
        tokenprune.patch(model, "at_edm", keep=0.4, attention="cross")
    model, _ = build("unet_sd")
    with pytest.raises(tokenprune.UnsupportedMethod, match="not known before it"):
        tokenprune.patch(model, "at_edm", keep=0.4, attention="cross")


def test_stacks_at_the_edges_are_the_first_on_the_way_down_and_the_last_on_the_way_up():
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(4, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    ).eval()
    inputs = {
        "sample": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.zeros(1, 3, 8),
    }
    stacks = [name for name, module in model.named_modules() if type(module).__name__ == "Transformer2DModel"]
    whole = {}
    for step in (701, 699):  # of 1000, behind and in the last 70% of the run
        seen: dict[str, int] = {}
        tokenprune.patch(model, "at_edm", schedule=dict.fromkeys(stacks, 0.3))
        for name, module in model.named_modules():
            if name.endswith("transformer_blocks.1"):
                module.attn1.register_forward_pre_hook(
                    lambda _, args, name=name, seen=seen: seen.update({name: args[0].shape[1]})
                )
        run(model, {**inputs, "timestep": torch.tensor(step)})
        whole[step] = {n.rsplit(".", 2)[0] for n, count in seen.items() if count in (64, 16)}
        tokenprune.unpatch(model)
        for module in model.modules():
            module._forward_pre_hooks.clear()
    edges = {
        "down_blocks.1.attentions.0",
        "down_blocks.2.attentions.0",
        "up_blocks.0.attentions.2",
        "up_blocks.1.attentions.2",
    }
    assert edges <= whole[701]
    assert not edges & whole[699]
