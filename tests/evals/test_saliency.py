import numpy as np
import pytest
import timm
import torch

from tokenprune.evals.saliency import SaliencyDecoder, feature_cosine, saliency_correlation, saliency_map


def test_correlation_is_numpys_an_image_at_a_time():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(5, 1, 9, 7, generator=generator) for _ in range(2))
    expected = [np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(saliency_correlation(first, second), expected, atol=1e-7)


def test_correlation_ignores_gain_and_offset_and_is_zero_for_a_flat_map():
    maps = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(saliency_correlation(0.1 * maps + 0.6, maps), torch.ones(2, dtype=torch.double))
    torch.testing.assert_close(saliency_correlation(1 - maps, maps), -torch.ones(2, dtype=torch.double))
    assert saliency_correlation(torch.full_like(maps, 0.3), maps).abs().max() < 1e-6


def test_cosine_by_hand():
    features = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert feature_cosine(features, torch.tensor([[4.0, 3.0], [0.0, 2.0]])).tolist() == pytest.approx([0.96, 0.0])


def test_the_map_has_the_size_of_an_oblong_image_and_comes_from_the_normalised_grid():
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=(56, 98), depth=2, num_classes=0).eval()
    decoder = SaliencyDecoder().eval()
    images = torch.randn(2, 3, 56, 98)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 1:]
        expected = decoder(tokens.transpose(1, 2).unflatten(2, (4, 7)), (56, 98))
    maps = saliency_map(model, decoder, images)
    assert maps.shape == (2, 1, 56, 98)
    assert not maps.requires_grad
    torch.testing.assert_close(maps, expected)
