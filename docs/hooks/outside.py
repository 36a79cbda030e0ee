"""Pages link to files of the repository outside of this folder; the site gets these files, and the links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = (
    "LICENSES.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "tokenprune/defaults.json",
    "examples/slurm.sh",
    "examples/two_nodes.sh",
)


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    inside = page.file.src_uri in OUTSIDE
    return re.sub(r"\]\(docs/" if inside else rf"\]\(\.\./(?={'|'.join(map(re.escape, OUTSIDE))})", "](", markdown)
