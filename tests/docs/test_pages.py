"""The site has every public name, and no link of a page leads nowhere; mkdocs itself checks those within docs/."""

from __future__ import annotations

import importlib
import re

import pytest
from documents import PAGES, ROOT

import tokenprune


def test_every_public_name_is_in_the_reference() -> None:
    shown = []
    for path in re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M):
        module, _, name = path.rpartition(".")
        shown.append(getattr(importlib.import_module(module), name))
    missing = [name for name in tokenprune.__all__ if all(getattr(tokenprune, name) is not one for one in shown)]
    assert missing == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1].split("\n\n")[0]
    listed = set(re.findall(r": (\S+\.md)$", navigation, re.M))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages <= listed


def test_every_method_that_a_picture_is_named_for_is_one() -> None:
    pictures = {path.stem for path in ROOT.glob("docs/images/methods/*.jpg")}
    assert pictures <= {method.name for method in tokenprune.methods()}
    assert sum(path.stat().st_size for path in ROOT.glob("docs/images/methods/*.jpg")) < 600_000
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(images/methods/(\w+)\.jpg\)", page)) == pictures


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if page.startswith("docs/") and not file.exists():  # of the repository's root, which the site gets too
            file = ROOT / path
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    plain = [re.sub(r"[`*]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in plain}
