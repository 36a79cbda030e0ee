"""The page of `tokenprune compare` in a headless Chromium, at the width of a desk and of a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tokenprune import cli

pytestmark = pytest.mark.hosts

# Goes through the page as a reader does, and leaves what it sees in the title.
READER = """
<script>
addEventListener("load", () => setTimeout(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const seen = { marks: all("#plot .mark").length, rows: all("#table tbody tr").length };
  const table = () => all("#table tbody tr td:first-child").map((cell) => cell.textContent);
  const pixels = () => all("#pictures canvas").map((canvas) => canvas.toDataURL());
  all("#legend button").find((button) => button.textContent === "random").click();
  seen.withoutRandom = all("#plot .mark").length;
  all("#plot .mark")[1].dispatchEvent(new Event("pointerenter"));
  seen.point = document.getElementById("point").textContent;
  all("#table th button").find((button) => button.textContent === "speed-up").click();
  seen.sorted = all("#table tbody tr").map((line) => parseFloat(line.children[columnOf("speed-up")].textContent));
  const label = () => all("#pictures canvas").map((canvas) => canvas.getAttribute("aria-label"));
  const move = (id, value) => {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event("input"));
    return { label: label(), pixels: pixels() };
  };
  const [last, first] = [move("layer", 1000), move("layer", 0)];
  const fewer = (move("layer", 1000), move("budget", 1));
  seen.labels = [last.label, first.label, fewer.label];
  seen.drawn = [last.pixels.join() !== first.pixels.join(), last.pixels.join() !== fewer.pixels.join()];
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.width = innerWidth;
  function columnOf(name) {
    return all("#table th").findIndex((head) => head.textContent.startsWith(name));
  }
  document.title = JSON.stringify(seen);
}, 200));
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    methods = ["--method", "tome", "--method", "top_k", "--flops", "0.6", "--flops", "0.5"]
    small = ["--samples", "4", "--batch-size", "2", "--threads", "1", "--quiet"]
    assert cli.main(["compare", "--model", "digits-vit", *methods, *small, "--output", str(folder)]) == 0
    read = folder / "read.html"
    read.write_text((folder / "compare.html").read_text().replace("</body>", f"{READER}</body>"))
    return read


@pytest.mark.parametrize("width", [1280, 500])
def test_a_reader_finds_the_way(page: Path, width: int) -> None:
    chromium = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    assert chromium is not None, "this test needs Chromium: apt-get install chromium"
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},2000",
        "--virtual-time-budget=5000",
    ]
    found = subprocess.run(
        [chromium, *arguments, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = json.loads(re.search(r"<title>(.*?)</title>", found.stdout, re.DOTALL)[1].replace("&amp;", "&"))
    rows = json.loads((page.parent / "compare.json").read_text())["rows"]
    assert seen["marks"] == seen["rows"] == len(rows) == 15
    assert seen["withoutRandom"] == 13
    assert re.match(r"(tome|top_k) flops=0\.\d: ", seen["point"])
    assert seen["sorted"] == sorted(seen["sorted"], reverse=True)
    last, first, fewer = (int(re.search(r"(\d+) of 100", labels[0])[1]) for labels in seen["labels"])
    tokens = {(row["method"], row["budget"]): row["tokens"] for row in rows}
    assert first > last == tokens["tome", "flops=0.6"]
    assert fewer == tokens["tome", "flops=0.5"]
    assert seen["drawn"] == [True, True]
    assert seen["overflow"] <= 0, "the page is wider than the window"
    assert seen["width"] == width
