from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.errors import TokenPruneError
from tokenprune.evals import digits_denoisers as denoisers


def _forward(model, count, device="cpu"):
    with torch.device(device):
        return denoisers.predict(model, torch.zeros(count, 3, 36, 36), torch.full((count,), 500.0), torch.arange(count))


def test_transformer_blocks_are_seven_tenths_of_the_unets_multiply_adds():
    with torch.device("meta"):
        model = denoisers.unet()
    tokens = Counter()
    for name, module in model.named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.register_forward_pre_hook(
                lambda _, inputs, kwargs, name=name: tokens.update({name: inputs[0].shape[1]}), with_kwargs=True
            )
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        _forward(model, 1, "meta")
    assert len(tokens) == 12
    assert set(tokens.values()) == {18 * 18}
    counts = counter.get_flop_counts()
    blocks = [name for name in counts if name.removeprefix("UNet2DConditionModel.") in tokens]
    assert len(blocks) == 12
    share = sum(sum(counts[name].values()) for name in blocks) / counter.get_total_flops()
    # By hand: 4 C^2 of self-attention, 2 C^2 of cross-attention and 12 C^2 of the MLP a token, and both attentions.
    n, c, text, words = 324, 48, denoisers.PROMPT_TOKENS, denoisers.VOCABULARY
    block = n * (18 * c * c + 2 * n * c + 2 * text * c) + 2 * text * words * c
    assert sum(sum(counts[name].values()) for name in blocks) == 12 * 2 * block
    assert 0.70 <= share <= 0.75


def test_the_dit_has_at_least_256_tokens():
    model = denoisers.dit()
    seen = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert _forward(model, 2).shape == (2, 3, 36, 36)
    assert seen == [(2, 324, 96)]


def test_prompts_name_the_digit_and_the_third():
    words = denoisers.prompts(torch.tensor([7, denoisers.UNCONDITIONAL]), torch.tensor([[0.0, 35.9], [18.0, 12.1]]))
    assert words.shape == (2, denoisers.PROMPT_TOKENS, denoisers.VOCABULARY)
    assert words.argmax(-1).tolist() == [[0, 8, 11, 16], [0, 17, 12, 15]]
    assert denoisers.prompts(torch.tensor([0])).argmax(-1).tolist() == [[0, 1, 17, 17]]
    assert (words.sum(-1) == 1).all()


def test_the_unet_reads_its_prompt():
    torch.manual_seed(0)
    model = denoisers.unet()
    first, second = _forward(model, 2)
    assert not torch.allclose(first, second)


def test_a_name_that_is_not_known_is_refused():
    with pytest.raises(TokenPruneError, match="dit-digits, unet-digits"):
        denoisers.untrained("dit")
