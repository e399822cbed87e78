"""Lines of files, read with the line named where something is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any


class DataError(ValueError):
    """A data file that is not what it should be; names file and line, what was expected and what came."""


def text_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """The lines of a file in UTF-8, with their numbers; DataError names the line that is in another encoding."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: expected UTF-8, got byte {raw[error.start]:#04x}") from error


def json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their line numbers; empty lines are left out."""
    for number, line in text_lines(path):
        if line.strip():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON: {error}") from error
            if "\\u" in line:
                try:
                    json.dumps(content, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    raise DataError(f"{path}, line {number}: expected Unicode, got half of a surrogate pair") from error
            if not isinstance(content, dict):
                raise DataError(f"{path}, line {number}: expected an object, got {type(content).__name__}")
            yield number, content
