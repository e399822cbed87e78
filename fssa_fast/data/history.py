"""The history of a server: which version answered whom, and which answers were chosen; JSON, a line each.

No line holds a text or a name. Users and choices are digests, so that lines of one user, and the choice itself in the
users' database, can be found by whoever has the database; where a user is deleted there, nothing is left to find. (A
digest hides a name from nobody who can guess it.)
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fssa_fast.data.lines import DataError, json_lines

BASE_VERSION = "base"
"""What answers of the untouched model carry in place of a version."""


def digest(*texts: str) -> str:
    """What stands for a user's name, or for a choice's prompt, chosen and rejected text."""
    words = "\0".join(texts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(words, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Made:
    """How an answer was made.

    version: of the adapter, or BASE_VERSION. latent: the version of the user whose row steered; None for the prior, a
    blend, and the base. sampling: the request's, with the seed.
    """

    version: str
    latent: int | None
    strength: float
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One event. time: seconds since 1970. experiment: the name that versions were drawn by.

    A "completion" has its id and how it was made. A "choice" has its digest, the version of the user and the number of
    choices that it led to, and how the better and the worse answer were made, where this server made them.
    """

    kind: Literal["completion", "choice"]
    time: float
    experiment: str
    user: str | None
    version: str
    id: str | None = None
    made: Made | None = None
    choice: str | None = None
    latent: int | None = None
    choices: int | None = None
    better: Made | None = None
    worse: Made | None = None


class History:
    """Appends lines to a file. Safe between threads, and between processes on one machine: a line is one write."""

    def __init__(self, path: str | os.PathLike[str], experiment: str = "") -> None:
        self.path, self.experiment = Path(path), experiment
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._lock = threading.Lock()

    def completion(self, number: str, user: str | None, made: Made) -> None:
        """Records an answer to a user, by the stored name."""
        self._write(Line("completion", time.time(), self.experiment, _of(user), made.version, number, made))

    def choice(
        self, user: str, version: str, texts: tuple[str, str, str], latent: int, choices: int,
        better: Made | None = None, worse: Made | None = None,
    ) -> None:  # fmt: skip
        """Records a choice that has been stored: prompt, chosen, rejected; version: the one that answers this user."""
        self._write(Line("choice", time.time(), self.experiment, _of(user), version, None, None, digest(*texts),
                         latent, choices, better, worse))  # fmt: skip

    def _write(self, line: Line) -> None:
        found = {key: value for key, value in asdict(line).items() if value is not None}
        data = json.dumps(found).encode() + b"\n"
        with self._lock:
            os.write(self._file, data)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def _of(user: str | None) -> str | None:
    return None if user is None else digest(user)


def read_history(paths: Iterable[str | os.PathLike[str]]) -> list[Line]:
    """The lines of some files, in the order of their times. Raises DataError for one that is none, with its place."""
    found = []
    for path in paths:
        for number, content in json_lines(path):
            try:
                fields: dict[str, Any] = {"user": None} | content
                for key in {"made", "better", "worse"} & fields.keys():
                    fields[key] = Made(**fields[key])
                line = Line(**fields)
                if line.kind not in ("completion", "choice") or not isinstance(line.time, (int, float)):
                    raise TypeError(f"kind {line.kind!r}, time {line.time!r}")
            except TypeError as error:
                raise DataError(f"{path}, line {number}: expected a line of a server's history: {error}") from error
            found.append(line)
    return sorted(found, key=lambda line: line.time)
