import timm
import torch
from PIL import Image

from tokenprune.evals.transforms import denormalize, input_size, model_transform, normalization, square_transform


def test_transform_has_the_size_the_model_was_made_at():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(96, 64), depth=1)
    assert input_size(model) == (3, 96, 64)
    assert model_transform(model)(Image.new("RGB", (200, 300))).shape == (3, 96, 64)
    assert input_size(torch.nn.Identity()) == (3, 224, 224)


def test_normalization_is_read_from_the_transform():
    transform = square_transform(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    mean, std = normalization(transform)
    grey = transform(Image.new("RGB", (60, 40), (128, 128, 128)))
    assert grey.shape == (3, 32, 32)
    torch.testing.assert_close(denormalize(grey[None], mean, std), torch.full((1, 3, 32, 32), 128 / 255))
    assert normalization(lambda picture: picture) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_square_transform_takes_the_centre():
    picture = Image.new("RGB", (90, 30), "black")
    picture.paste("white", (30, 0, 60, 30))
    assert (square_transform(30, (0, 0, 0), (1, 1, 1))(picture) == 1).all()


def test_denormalize_is_the_inverse():
    pictures = torch.rand(2, 3, 4, 4)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    inputs = (pictures - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(denormalize(inputs, mean, std), pictures)
