"""A tiny Llava for transformers' own common tests, beside which test_transformers_suite.py copies it.

TOKENPRUNE_PATCH holds the arguments of the patch that every model gets where it is made, as JSON; null for none.
"""

import functools
import json
import os
import unittest

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

PATCH = json.loads(os.environ.get("TOKENPRUNE_PATCH", "null"))
VISUAL = 16


def patched(init):
    """`init`, behind which the model that it has made is patched."""

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        init(self, *args, **kwargs)
        tokenprune.patch(self, **PATCH)

    return wrapper


if PATCH:
    import tokenprune

    for cls in (LlavaModel, LlavaForConditionalGeneration):
        cls.__init__ = patched(cls.__init__)


class Llava:
    """What the mixin asks of a model tester."""

    batch_size, num_channels, image_size, patch_size = 3, 3, 8, 2
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    text_length, image_token, pad_token = 7, 0, 1
    seq_length = VISUAL + text_length
    encoder_seq_length = seq_length
    vocab_size = 99
    is_training = True

    def get_config(self):
        size = {
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        image = {"image_size": self.image_size, "patch_size": self.patch_size, "projection_dim": 32}
        text = {"vocab_size": self.vocab_size, "num_key_value_heads": 2, "max_position_embeddings": 128}
        return LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **image, **size},
            text_config={"model_type": "llama", "pad_token_id": self.pad_token, **text, **size},
            image_token_index=self.image_token,
            image_seq_length=VISUAL,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2) + 2
        ids[:, :VISUAL] = self.image_token
        pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return config, {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class LlavaTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)
    _is_composite = True
    # nothing behind the tower's last layer reads its norm
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = Llava()

    def test_it_is_patched_where_asked(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for cls in self.all_model_classes:
            model = cls(config).eval()
            model(**inputs)
            if PATCH is None:
                assert not any(module._forward_pre_hooks for module in model.modules())
                continue
            (place,) = tokenprune.report(model).to_dict()["places"]
            assert place["tokens_in"] == VISUAL
            assert place["tokens_out"] == PATCH.get("tokens", VISUAL // 2)
