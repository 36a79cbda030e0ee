"""The classifier that judges drawn digits: it reads them, and its features are where Fréchet distances are taken."""

from importlib import resources

import torch
from torch import Tensor, nn

from tokenprune.evals.digits import NUM_CLASSES

CHECKPOINT = "digit_reader.safetensors"
FEATURES = 64


class DigitReader(nn.Module):
    """Five convolutions and a mean over places: images [B, 3, S, S], as `drawn_digits.to_model` makes them, to
    features [B, 64] or logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 1), (32, 48, 2), (48, 64, 1), (64, 96, 2), (96, FEATURES, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """What enters the last layer, [B, 64]."""
        pooled: Tensor = self.layers(images).mean(dim=(2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def digit_reader() -> DigitReader:
    """The reader with the weights that the package ships, fp32, in eval mode."""
    from safetensors.torch import load

    reader = DigitReader()
    stored = load((resources.files("tokenprune.evals") / "checkpoints" / CHECKPOINT).read_bytes())
    reader.load_state_dict(stored)
    return reader.eval()


def read(reader: DigitReader, images: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Features [N, 64] and predicted digits [N] of `images` [N, 3, S, S], where these are, a batch at a time wherever
    the reader is."""
    device = reader.head.weight.device
    with torch.inference_mode():
        features = torch.cat([reader.features(part.to(device)) for part in torch.split(images, batch)])
        digits = reader.head(features).argmax(dim=1)
    return features.to(images.device), digits.to(images.device)
