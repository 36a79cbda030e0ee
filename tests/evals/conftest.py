import pytest
import torch
from safetensors.torch import save_file

from tokenprune.evals import digits_denoisers


@pytest.fixture
def small_denoisers(monkeypatch):
    """Makes the small diffusion models smaller still."""
    dit, unet = digits_denoisers.dit, digits_denoisers.unet
    monkeypatch.setattr(digits_denoisers, "dit", lambda: dit(num_layers=3, num_attention_heads=1))
    monkeypatch.setattr(digits_denoisers, "unet", lambda: unet(block_out_channels=(8, 16), attention_head_dim=1))


@pytest.fixture
def checkpoints(small_denoisers, tmp_path):
    """A folder with random weights of both, as a training stores them."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.manual_seed(0)
    for name, file in digits_denoisers.CHECKPOINTS.items():
        model = digits_denoisers.untrained(name)
        for parameter in model.parameters():  # a DiT's last layer starts at zero
            torch.nn.init.normal_(parameter, std=0.1)
        save_file({key: value.half() for key, value in model.state_dict().items()}, folder / file)
    return folder
