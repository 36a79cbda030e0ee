"""Files that say what belongs to an image: JSON lines of captions or questions, and lists of lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenprune.errors import TokenPruneError


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises TokenPruneError where there is no such file, or none of them; what: they are, in its words.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenPruneError(f"{path} cannot be read, a text file with one of the {what} a line: {error}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise TokenPruneError(f"{path} is empty; it should have one of the {what} a line")
    return found


def read_records(path: str | Path, example: str, required: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; `image` is a file, absolute or beside this one, and becomes its Path.

    required: names whose value must not be missing or empty. example: a whole line, for the error.

    Raises TokenPruneError, with the line, for what is missing or no JSON.
    """
    folder, found = Path(path).parent, list[dict[str, Any]]()
    for number, line in enumerate(read_lines(path, "records, as JSON,"), 1):
        where = f"record {number} of {path}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TokenPruneError(f"{where} is no JSON ({error}); a record is such as {example}") from error
        missing = [name for name in required if not isinstance(record, dict) or not record.get(name)]
        if missing:
            raise TokenPruneError(f"{where} has no {' and no '.join(missing)}; a record is such as {example}")
        record["image"] = folder / record["image"]
        if not record["image"].is_file():
            raise TokenPruneError(f"{where} names a picture that is not there: {record['image']}")
        found.append(record)
    return found


def texts(value: object, where: str) -> list[str]:
    """One text or a list of them, as a list.

    Raises TokenPruneError for anything else.
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise TokenPruneError(f"{where} is {value!r}: a text or a list of texts is needed")
    return found
