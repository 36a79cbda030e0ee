import copy

import pytest
import timm
import torch
from torch import nn

from tokenprune.errors import UnsupportedModel
from tokenprune.evals.flops import multiply_adds
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.smaller_input import resize, smaller_input


def vit_multiply_adds(tokens, patches, dim=192, depth=3, hidden=768, patch=16, classes=10):
    block = tokens * dim * 3 * dim + 2 * tokens * tokens * dim + tokens * dim * dim + 2 * tokens * dim * hidden
    return patches * 3 * patch * patch * dim + depth * block + dim * classes


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=10, img_size=96).eval()


def test_multiply_adds_is_the_formula_with_attention(vit):
    assert multiply_adds(vit, torch.zeros(4, 3, 96, 96)) == vit_multiply_adds(tokens=37, patches=36)


@pytest.mark.parametrize(("ratio", "rows"), [(0.05, 1), (0.45, 4), (0.5, 4), (0.70, 5), (0.99, 5)])
def test_nearest_size_is_found(vit, ratio, rows):
    found = smaller_input(vit, torch.rand(2, 3, 96, 96), ratio)
    every = [vit_multiply_adds(r * r + 1, r * r) / vit_multiply_adds(37, 36) for r in range(1, 6)]
    assert found.size == (rows * 16, rows * 16)
    assert found.flops_ratio == pytest.approx(every[rows - 1])
    assert abs(found.flops_ratio - ratio) == pytest.approx(min(abs(value - ratio) for value in every))
    assert found.model(resize(torch.rand(2, 3, 96, 96), found.size)).shape == (2, 10)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "beit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_relpos_small_patch16_224",
        "vit_tiny_r_s16_p8_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_the_model_itself_stays_as_it_was(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        before, state = model(images), copy.deepcopy(model.state_dict())
        smaller_input(model, images, 0.5)
        after = model(images)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_non_square_keeps_its_shape():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=(64, 128)).eval()
    height, width = smaller_input(model, torch.rand(1, 3, 64, 128), 0.5).size
    assert (height, width) == (48, 96)


def test_a_model_of_one_size_says_so():
    model = timm.create_model("cait_xxs24_224", depth=2).eval()
    with pytest.raises(UnsupportedModel, match="one size only"):
        smaller_input(model, torch.rand(1, 3, 224, 224), 0.5)


def test_a_model_without_a_grid_says_so():
    with pytest.raises(UnsupportedModel, match="patch grid"):
        smaller_input(nn.Flatten(), torch.rand(1, 3, 32, 32), 0.5)


def test_shared_copy_has_its_own_modules_on_the_same_weights(vit):
    twin = shared_copy(vit)
    assert all(a is b for a, b in zip(vit.parameters(), twin.parameters(), strict=True))
    assert not set(map(id, vit.modules())) & set(map(id, twin.modules()))
    images = torch.rand(2, 3, 96, 96)
    assert torch.equal(twin(images), vit(images))
    twin.train()
    assert not vit.training


def test_resize_keeps_dtype_and_is_a_no_op_at_the_same_size():
    images = torch.rand(2, 3, 32, 48, dtype=torch.bfloat16)
    assert resize(images, (32, 48)) is images
    assert resize(images, (16, 24)).dtype == torch.bfloat16
