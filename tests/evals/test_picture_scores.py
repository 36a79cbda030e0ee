"""Scores of pairs and sets of pictures against formulas and the libraries that they are by."""

import json
import math

import pytest
import torch
import torchvision
from PIL import Image
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from tokenprune import cli
from tokenprune.errors import TokenPruneError
from tokenprune.evals import picture_scores
from tokenprune.evals.frechet import frechet_distance, gaussian
from tokenprune.evals.models import load_model
from tokenprune.evals.picture_scores import frechet_of_folders, lpips_of, pair_scores, picture_tensor, ssim


@pytest.fixture
def folders(tmp_path):
    """Four pictures, and the same with noise."""
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "other"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for number in range(4):
        base = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 5, generator=generator), (20, 24), mode="bicubic")
        for name, noise in (("one", 0), ("other", 0.02 * (1 + number))):
            noisy = base + noise * torch.randn(base.shape, generator=generator)
            pixels = (noisy[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / name / ("deep" if number == 3 else "") / f"{number}.png")
    return tmp_path / "one", tmp_path / "other"


def naive_ssim(a, b):
    """Wang et al. (2004), equation 13, in windows of 11 x 11 pixels around each one, mirrored at the edges."""
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2)).double()
    weight = torch.outer(line, line) / line.sum() ** 2
    height, width = a.shape[1:]
    values = []
    for one, other in zip(a.double(), b.double(), strict=True):
        x, y = (
            torch.nn.functional.pad(plane[None, None], (5, 5, 5, 5), mode="reflect")[0, 0] for plane in (one, other)
        )
        for row in range(height):
            for column in range(width):
                u, v = (plane[row : row + 11, column : column + 11] for plane in (x, y))
                mu, mv = (weight * u).sum(), (weight * v).sum()
                uu, vv, uv = ((weight * p).sum() for p in ((u - mu) ** 2, (v - mv) ** 2, (u - mu) * (v - mv)))
                top = (2 * mu * mv + 0.01**2) * (2 * uv + 0.03**2)
                values.append(float(top / ((mu**2 + mv**2 + 0.01**2) * (uu + vv + 0.03**2))))
    return sum(values) / len(values)


def test_pairs_are_scored_as_by_hand(folders):
    one, other = folders
    found = pair_scores(one, other)
    files = ["0.png", "1.png", "2.png", "deep/3.png"]
    for number, file in enumerate(files):
        a, b = (picture_tensor(folder / file) for folder in folders)
        error = float((a - b).double().square().mean())
        assert found["psnr"][number].item() == pytest.approx(-10 * math.log10(error), rel=1e-5)
        assert found["ssim"][number].item() == pytest.approx(naive_ssim(a[0], b[0]), abs=1e-4)
    assert len(set(found["ssim"].tolist())) == 4
    assert ssim(a, a).item() == pytest.approx(1.0)


def test_what_cannot_be_paired_is_told(folders, tmp_path):
    one, other = folders
    with pytest.raises(TokenPruneError, match="11 x 11"):
        ssim(torch.zeros(1, 3, 8, 20), torch.zeros(1, 3, 8, 20))
    Image.new("RGB", (9, 9)).save(other / "0.png")
    with pytest.raises(TokenPruneError, match=r"another size than .*24 x 20 and 9 x 9"):
        pair_scores(one, other)
    (other / "0.png").rename(other / "x.png")
    with pytest.raises(TokenPruneError, match=r"different names: 0, x"):
        pair_scores(one, other)
    with pytest.raises(TokenPruneError, match="no pictures"):
        pair_scores(one, tmp_path / "nothing")
    (one / "1.png").write_bytes(b"no picture")
    (other / "x.png").rename(other / "0.png")
    with pytest.raises(TokenPruneError, match=r"1\.png is no picture that can be read|another size"):
        pair_scores(one, other)


def test_lpips_tells_which_weights_are_missing_and_takes_them_when_they_are_there(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(TokenPruneError, match=r"alexnet-owt-7be5be79\.pth, and they are not here: download https"):
        lpips_of("alex")
    with pytest.raises(TokenPruneError, match="alex, squeeze, vgg"):
        lpips_of("dino")
    torch.manual_seed(0)
    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    torch.save(weights, place / "squeezenet1_1-b8a52dc0.pth")
    found = pair_scores(*folders, lpips="squeeze")["lpips"]
    one, other = (picture_tensor(folder / "deep" / "3.png") for folder in folders)
    expected = learned_perceptual_image_patch_similarity(one, other, "squeeze", normalize=True)
    assert found[3].item() == pytest.approx(expected.item())
    assert found.min() > 1e-3
    assert lpips_of("squeeze")(one, one).item() == pytest.approx(0, abs=1e-7)
    with pytest.raises(TokenPruneError, match="4 x 4"):
        lpips_of("squeeze")(one[..., :4, :4], one[..., :4, :4])


def test_frechet_distance_in_the_features_of_a_given_model(folders):
    extractor = load_model("digits-vit")
    found = frechet_of_folders(*folders, extractor, batch_size=3)
    both = []
    for folder in folders:
        files = sorted(folder.rglob("*.png"))
        images = torch.stack([extractor.transform(Image.open(path).convert("RGB")) for path in files])
        with torch.no_grad():
            both.append(extractor.model.forward_head(extractor.model.forward_features(images), pre_logits=True))
    assert found.estimate == pytest.approx(frechet_distance(gaussian(both[0]), gaussian(both[1])), rel=1e-5)
    assert found.low <= found.estimate <= found.high
    assert found.estimate > 0


def test_the_command_tells_all_of_it(folders, capsys, monkeypatch, tmp_path):
    one, other = folders
    command = ["score", "--pictures", str(other), "--json"]
    assert cli.main([*command, "--reference", str(one), "--real", str(one), "--features", "digits-vit"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert {"pictures", "psnr", "ssim", "frechet", "frechet_low"} <= row.keys()
    assert row["psnr"] == pytest.approx(pair_scores(other, one)["psnr"].mean().item())
    monkeypatch.setattr(picture_scores.torch.hub, "get_dir", lambda: str(tmp_path))
    for arguments, message in (
        (["--lpips", "alex"], "nothing to score"),
        (["--real", str(one), "--lpips", "alex"], "--reference FOLDER"),
        (["--reference", str(one), "--features", "digits-vit"], "--real FOLDER"),
        (["--reference", str(one), "--lpips", "alex"], "torchvision's alexnet"),
        (["--prompts", str(tmp_path / "x.txt")], "x.txt cannot be read"),
    ):
        assert cli.main([*command, *arguments]) == 1
        assert message in capsys.readouterr().err
