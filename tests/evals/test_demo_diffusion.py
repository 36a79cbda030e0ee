import pytest
from PIL import Image

from tokenprune import cli
from tokenprune.evals import demo_diffusion, generation
from tokenprune.evals.table import Table


@pytest.mark.full
def test_demo_writes_a_grid_for_each_model_and_a_table(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_diffusion, "STEPS", 2)
    monkeypatch.setattr(demo_diffusion, "BATCH", 2)
    monkeypatch.setattr(generation, "REAL_IMAGES", 100)
    quick = ["--samples", "4", "--threads", "1", "--quiet"]
    assert cli.main(["demo-diffusion", "--checkpoint", str(checkpoints), "--output", str(tmp_path), *quick]) == 0
    table = Table.from_json((tmp_path / "table.json").read_text())
    for name in ("dit-digits", "unet-digits"):
        rows = {row["method"]: row for row in table.rows if row["model"] == name}
        assert {"unpatched", "fewer steps"} <= set(rows)
        assert rows["unpatched"]["time"] == 1.0
        assert rows["fewer steps"]["time"] > 0
        drawn = [row for row in rows.values() if row["time"] is not None]
        with Image.open(tmp_path / f"pictures-{name}.png") as picture:
            assert picture.width >= 2 * 72
            assert picture.height >= len(drawn) * 72
    assert "written to" in capsys.readouterr().out
