"""A tiny CLIP tower for transformers' own common tests, beside which test_transformers_suite.py copies it.

TOKENPRUNE_PATCH holds the arguments of the patch that every tower gets where it is made, as JSON; null for none.
"""

import functools
import json
import os
import unittest

from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from .test_modeling_common import ModelTesterMixin, floats_tensor

PATCH = json.loads(os.environ.get("TOKENPRUNE_PATCH", "null"))

if PATCH:
    import tokenprune

    init = CLIPVisionModel.__init__

    @functools.wraps(init)
    def patched_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        tokenprune.patch(self, **PATCH)

    CLIPVisionModel.__init__ = patched_init


class ClipTower:
    """What the mixin asks of a model tester."""

    batch_size, image_size, patch_size, num_channels = 3, 24, 4, 3
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    seq_length = (image_size // patch_size) ** 2 + 1
    is_training = False  # the tower has no loss

    def get_config(self):
        return CLIPVisionConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            projection_dim=32,
            attention_dropout=0.1,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape)}


class ClipTowerTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CLIPVisionModel, CLIPVisionModelWithProjection)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = ClipTower()

    @unittest.skip("an image tower has no inputs_embeds")
    def test_inputs_embeds(self):
        pass

    @unittest.skip("an image tower has no token embedding")
    def test_model_get_set_embeddings(self):
        pass

    def test_it_is_patched_where_asked(self):
        model = CLIPVisionModel(self.model_tester.get_config())
        hooked = any(module._forward_pre_hooks for module in model.modules())
        assert hooked == bool(PATCH)
