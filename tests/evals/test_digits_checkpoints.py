import pytest
import torch
from safetensors.torch import load_file

from tokenprune.errors import TokenPruneError
from tokenprune.evals import digits_checkpoints, digits_denoisers, train_diffusion
from tokenprune.evals.digits_checkpoints import trained

NAMES = tuple(digits_denoisers.CHECKPOINTS)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_first_folder_that_has_them(name, checkpoints, tmp_path):
    model = trained(name, [tmp_path, str(checkpoints)])
    stored = load_file(checkpoints / digits_denoisers.CHECKPOINTS[name])
    assert not model.training
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[key].float())


def test_what_a_training_wrote_is_what_is_loaded(small_denoisers, tmp_path, monkeypatch):
    for name, value in {"BATCH": 2, "VALIDATION_IMAGES": 2}.items():
        monkeypatch.setattr(train_diffusion, name, value)
    averaged = []
    save = train_diffusion.Training.save
    monkeypatch.setattr(
        train_diffusion.Training, "save", lambda self, path: (averaged.append(self.average), save(self, path))
    )
    train_diffusion.train("unet-digits", tmp_path, train_diffusion.Recipe(1, 1, 1e-3))
    for key, value in trained("unet-digits", [tmp_path]).state_dict().items():
        assert torch.equal(value, averaged[-1][key].half().float())


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_package_need_no_folder_and_a_named_folder_goes_first(name, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_checkpoints, "SHIPPED", checkpoints)
    shipped, named = trained(name).state_dict(), trained(name, [checkpoints]).state_dict()
    assert all(torch.equal(value, named[key]) for key, value in shipped.items())
    with pytest.raises(TokenPruneError, match="no "):
        trained(name, [tmp_path])


@pytest.mark.parametrize("name", NAMES)
def test_without_weights_the_training_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_checkpoints, "SHIPPED", tmp_path)
    with pytest.raises(TokenPruneError, match=f"tokenprune train {name} --output FOLDER.*--checkpoint FOLDER"):
        trained(name)
    with pytest.raises(TokenPruneError, match=f"tokenprune train {name} --output FOLDER.*goes on where it was stopped"):
        trained(name, [tmp_path / "nowhere"])


def test_weights_of_another_model_and_of_no_model_are_refused(checkpoints, tmp_path):
    (tmp_path / "unet_digits.safetensors").write_bytes((checkpoints / "dit_digits.safetensors").read_bytes())
    with pytest.raises(TokenPruneError, match="does not fit"):
        trained("unet-digits", [tmp_path])
    (tmp_path / "unet_digits.safetensors").write_bytes(b"nothing")
    with pytest.raises(TokenPruneError, match="no safetensors file"):
        trained("unet-digits", [tmp_path])
