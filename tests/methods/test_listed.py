"""The table of methods in the documentation is that of the methods that an image tower takes."""

from __future__ import annotations

import re
from pathlib import Path

from families import build

import tokenprune
from tokenprune import registry

ROOT = Path(__file__).parents[2]


def test_every_method_of_a_tower_is_in_the_table() -> None:
    page = (ROOT / "docs" / "vit.md").read_text().partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    found = {info.name for info in tokenprune.methods(build("class_token"))}
    own = {name for name in found if registry._METHODS[name].__module__.startswith("tokenprune.methods")}
    assert sorted(listed) == sorted(own)
