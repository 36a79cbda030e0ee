import pickle
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.evals.models import load_model, noise


@pytest.fixture
def tiny():
    torch.manual_seed(1)
    return timm.create_model("test_vit").eval()


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_vit.py").write_text(
        "import timm\n"
        "def build():\n    return timm.create_model('vit_tiny_patch16_224', img_size=64, depth=1, num_classes=7)\n"
        "def wrong():\n    return 3\n"
        "def needs(argument):\n    return argument\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("my_own_vit", None)


def test_timm_name_with_a_checkpoint(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("test_vit", checkpoint=tmp_path / "w.safetensors")
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert noise(loaded, 2, seed=0).shape == (2, 3, 160, 160)
    assert torch.equal(noise(loaded, 2, seed=0), noise(loaded, 2, seed=0))
    assert loaded.mean == pytest.approx(tiny.pretrained_cfg["mean"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w.pth", "is refused: only .safetensors"),
        ("w.bin", "is refused: only .safetensors"),
        ("renamed.safetensors", "no safetensors file, whatever its name"),
    ],
)
def test_a_pickle_is_refused_and_never_run(name, message, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TokenPruneError, match=message):
        load_model("test_vit", checkpoint=tmp_path / name)
    assert not (tmp_path / "was-run").exists()


def test_a_checkpoint_that_is_not_there_or_does_not_fit(tiny, tmp_path, own_module):
    with pytest.raises(TokenPruneError, match="no checkpoint"):
        load_model("test_vit", checkpoint=tmp_path / "absent.safetensors")
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TokenPruneError, match="could not be loaded"):
        load_model("test_vit", checkpoint=tmp_path / "other.safetensors")
    with pytest.raises(TokenPruneError, match="does not fit"):
        load_model("my_own_vit:build", checkpoint=tmp_path / "other.safetensors")


def test_own_function_with_a_checkpoint(own_module):
    expected = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=7)
    save_file(expected.state_dict(), own_module / "w.safetensors")
    loaded = load_model("my_own_vit:build", checkpoint=own_module / "w.safetensors")
    assert torch.equal(loaded.model.head.weight, expected.head.weight)
    assert noise(loaded, 1, seed=0).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_own_vit:wrong", "int, not a torch module"),
        ("my_own_vit:absent", "could not be called"),
        ("my_own_vit:needs", "could not be called"),
        ("no_such_module_here:build", "could not be called"),
        ("vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("zzz", "no model is called 'zzz'"),
    ],
)
def test_unknown_names_say_so(name, message, own_module):
    with pytest.raises(UnsupportedModel, match=message):
        load_model(name)


def test_a_download_that_fails_names_the_way_out(monkeypatch):
    def offline(*_arguments, **_options):
        raise ConnectionError("no network here\nlong trace")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(TokenPruneError, match=r"no network here; --checkpoint .* --random-weights") as raised:
        load_model("vit_tiny_patch16_224")
    assert "long trace" not in str(raised.value)


def test_hugging_face_names_go_to_timm(monkeypatch):
    asked = []

    def create(name, **options):
        asked.append((name, options["pretrained"]))
        return torch.nn.Identity()

    monkeypatch.setattr(timm, "create_model", create)
    load_model("timm/vit_tiny_patch16_224")
    load_model("hf-hub:timm/vit_tiny_patch16_224", random_weights=True)
    assert asked == [("hf-hub:timm/vit_tiny_patch16_224", True), ("hf-hub:timm/vit_tiny_patch16_224", False)]


def test_shipped_models_take_no_other_weights():
    with pytest.raises(TokenPruneError, match="its own weights"):
        load_model("digits-vit", random_weights=True)


@pytest.mark.parametrize("name", ["digits-vit", "digits-swin"])
def test_digits_come_with_fresh_test_pictures(name):
    loaded = load_model(name)
    first, again, other = (loaded.data(6, seed) for seed in (1, 1, 2))
    images, labels = next(first.batches(6))
    assert labels is not None
    assert loaded.model(images).shape == (6, first.classes)
    assert torch.equal(images, next(again.batches(6))[0])
    assert not torch.equal(images, next(other.batches(6))[0])


def test_dinov2_comes_with_photographs_grouped_and_saliency():
    loaded = load_model("dinov2-small-wheel")
    data = loaded.data(0, 0)
    assert data.classes is None
    assert len(set(data.groups.tolist())) == 9
    images, labels = next(data.batches(2))
    assert labels is None
    with torch.no_grad():
        maps = loaded.saliency(loaded.model, images)
    assert maps.shape == (2, 1, 224, 224)
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
