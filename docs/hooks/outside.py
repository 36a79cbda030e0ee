"""Pages link to files of the repository outside of this folder; the site gets these files, and the links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = ("LICENSES.md", "CONTRIBUTING.md", "CHANGELOG.md", "tokenprune/defaults.json")


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    names = "|".join(map(re.escape, OUTSIDE))
    return re.sub(rf"\]\(\.\./({names})(#[^)]*)?\)", r"](\1\2)", markdown)
