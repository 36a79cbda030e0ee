"""What the pages tell a reader to type: the commands and the Python in README, docs, CONTRIBUTING and the examples."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/**/*.md")),
        *sorted(ROOT.glob("examples/**/*.py")),
        *sorted(ROOT.glob("examples/**/*.md")),
    )
]
SHELL = ("", "sh", "bash", "shell", "console")
DATA = ("text", "json", "toml", "yaml")
PROGRAMS = ("tokenprune", "python", "make", "pip", "accelerate", "torchrun", "srun", "sbatch", "mkdocs")

FENCED = re.compile(
    r"^(?P<indent> *)(```+|~~~+) *(?:\{\.)?(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)\2 *$", re.S | re.M
)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n|\n(?= {4}))+")
INCLUDED = re.compile(r'^--8<-- "([^"]+)"$', re.M)
IN_DOCSTRING = re.compile(rf"^(?: +|Run it: )(?=(?:{'|'.join(PROGRAMS)}) )((?:.*\\\n)*.*)$", re.M)


@dataclass(frozen=True)
class Command:
    """A line for a shell, without its comment; `inline`: in the middle of a sentence, where it may be a name alone."""

    text: str
    where: str
    inline: bool = False


@dataclass(frozen=True)
class Block:
    code: str
    where: str


def commands(page: str) -> list[Command]:
    """Those of a page, in its order. Raises ValueError for a fence of a language that nothing here knows."""
    text, found = read(page), list[tuple[int, Command]]()
    for start, language, body in snippets(page):
        where = f"{page}:{line_of(text, start)}"
        if language in SHELL:
            lines = re.sub(r"\\\n *", "", body).splitlines()
            found += [(start, Command(one, where)) for line in lines if (one := typed(line, language))]
        elif language not in ("python", *DATA):
            raise ValueError(f"{where}: no test knows what to do with a block of {language!r}")
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose(page)):
        one = " ".join(match[1].split())
        if len(one.split()) > 1 and one.split()[0] in PROGRAMS:
            found.append((match.start(), Command(one, f"{page}:{line_of(text, match.start())}", inline=True)))
    if page.endswith(".py"):
        for match in IN_DOCSTRING.finditer(text):
            one = " ".join(match[1].replace("\\\n", " ").split())
            found.append((match.start(), Command(one, f"{page}:{line_of(text, match.start())}")))
    return [command for _, command in sorted(found, key=lambda one: one[0])]


def blocks(page: str) -> list[Block]:
    """The Python blocks of a page, in its order."""
    text = read(page)
    return [
        Block(body, f"{page}:{line_of(text, start)}")
        for start, language, body in snippets(page)
        if language == "python"
    ]


def calls(page: str) -> list[Block]:
    """The calls of the package's functions in the middle of sentences, such as `tokenprune.patch(vit, keep=0.5)`."""
    text = prose(page)
    spans = re.finditer(r"(?<!`)`(tokenprune\.\w+\([^`]*\))`(?!`)", text)
    return [Block(" ".join(match[1].split()), f"{page}:{line_of(text, match.start())}") for match in spans]


def snippets(page: str) -> list[tuple[int, str, str]]:
    """Where each block of a page begins, its language and what is in it; an indented one has no language of its own,
    and is for the shell where it begins with a program."""
    text = read(page)
    found = [(match.start(), match["language"], textwrap.dedent(match["body"])) for match in FENCED.finditer(text)]
    if page.endswith(".md"):
        for match in INDENTED.finditer(FENCED.sub(blank, text)):
            body = textwrap.dedent(match[0])
            found.append((match.start(), "sh" if body.split()[0] in PROGRAMS else "python", body))
    return sorted(found)


def prose(page: str) -> str:
    """A page without its blocks."""
    text = FENCED.sub(blank, read(page))
    return INDENTED.sub(blank, text) if page.endswith(".md") else text


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", "x", match[0])


def read(page: str) -> str:
    """A page with what it includes; of a Python file its docstring, with line numbers kept."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if not page.endswith(".py"):
        return INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8").rstrip("\n"), text)
    return ast.get_docstring(ast.parse(text), clean=False) or ""


def typed(line: str, language: str) -> str:
    """The command in a line, without prompt and comment; in a console's transcript, only what follows a prompt."""
    prompt = re.match(r"\s*\$ ", line)
    if language == "console" and not prompt:
        return ""
    line = line[prompt.end() :] if prompt else line
    if line.startswith("eval "):
        return re.sub(r"\s+#.*", "", line)
    line = re.sub(r" > \S+$", "", line)
    return " ".join(shlex.quote(word) if " " in word else word for word in shlex.split(line, comments=True))


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
