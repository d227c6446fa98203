"""JSON files of a run: written whole or not at all, or row by row and cut back on resuming."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from scir_jax.errors import InputError


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes a JSONL file whole or not at all."""
    _write(path, map(line, rows))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    _write(path, [json.dumps(value, indent=1, ensure_ascii=False) + "\n"])


def _write(path: Path, texts: Iterable[str]) -> None:
    if not isinstance(path, Path):  # in a bucket, where an object is written whole
        path.write_text("".join(texts))
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(texts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def line(row: dict) -> str:
    """Returns one line of a JSONL file. A lone surrogate, which a model's bytes may decode to, is written escaped."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row, allow_nan=False)
    return text + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of the run.

    Raises:
      InputError: it does not hold an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: was changed since it was written ({error}); restore it") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: was changed since it was written (it holds no object); restore it")
    return value


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    """Yields consecutive parts of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class AppendOnly:
    """A JSONL file that is written row by row and cut back when a run resumes from an earlier step."""

    def __init__(self, path: Path):
        self.path = path
        self._file: TextIO | None = None

    def rows(self) -> list[dict]:
        """Reads the rows written so far; a torn last line, which a killed process may leave, does not count."""
        self.sync()
        rows = []
        if self.path.exists():
            for text in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(text))
        return rows

    def cut(self, keep) -> list[dict]:
        """Keeps the rows for which keep(row) is true, in order, and returns them."""
        rows = [row for row in self.rows() if keep(row)]
        self.rewrite(rows)
        return rows

    def rewrite(self, rows: list[dict]) -> None:
        """Puts these rows in the place of those that are there; without rows and without a file it makes none."""
        self.close()
        if rows or self.path.exists():
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text("".join(map(line, rows)), encoding="utf-8")
            os.replace(partial, self.path)

    def write(self, row: dict) -> None:
        """Appends a row."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(line(row))

    def sha256(self) -> str:
        """Computes the SHA-256 of what was written so far."""
        self.sync()
        return hashlib.sha256(self.path.read_bytes() if self.path.exists() else b"").hexdigest()

    def sync(self) -> None:
        """Brings everything written so far to the disk before it returns."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Brings everything to the disk and closes the file."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None
