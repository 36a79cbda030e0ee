"""One self-contained page of a comparison: what to take, a plot, tables, and which tokens survive."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from tokenprune.evals.comparison.advice import advised, frontier, qualities
from tokenprune.evals.table import Table


@dataclass(frozen=True)
class Compared:
    """What was found of one model. overlays, pictures: as `tokenprune.evals.comparison.overlays` gives them; drawn:
    what each row of a diffusion model draws, as `tokenprune.evals.comparison.drawing` gives it."""

    name: str
    table: Table
    pictures: Sequence[str] = ()
    overlays: dict[str, Any] = field(default_factory=lambda: {"grid": None, "arms": []})
    drawn: Sequence[dict[str, Any]] = ()


def write_page(path: Path, compared: Sequence[Compared], command: str) -> None:
    """Writes the page of `compared` to `path`; it needs no network and no server. command: that measures it again."""
    models = [_model(one) for one in compared]
    # "</" would end the element that the data are in.
    data = json.dumps({"models": models, "command": command}, allow_nan=False).replace("</", "<\\/")
    page = _part("page.html")
    for name, text in (
        ("TITLE", html.escape(", ".join(one.name for one in compared))),
        ("STYLE", _part("page.css")),
        ("SCRIPT", _part("page.js")),
        ("DATA", data),
    ):
        page = page.replace(f"<!--{name}-->", text)
    part = path.with_name(f"{path.name}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def _model(one: Compared) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(one.table.to_json())
    rows = one.table.rows
    judged = [
        {
            "column": quality.column,
            "name": f"{quality.name}{', less is better' if quality.lower else ''}",
            "frontier": frontier(rows, quality),
            "advice": advised(rows, quality),
        }
        for quality in qualities(rows)
    ]
    return {
        "name": one.name,
        **table,
        "qualities": judged,
        "pictures": list(one.pictures),
        "overlays": one.overlays,
        "drawn": list(one.drawn),
    }


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
