"""What finished stages wrote, by SHA-256, so that nothing that changed behind a run's back is taken for its own."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from scir_jax.data.jsonl import read_json, write_json
from scir_jax.errors import InputError

NAME = "files.json"
# What stages leave; files that grow with each stage are known up to where they were.
ONCE = (
    "data.json",
    "iteration_*/responses.jsonl",
    "iteration_*/pairs.jsonl",
    "iteration_*/evaluation.json",
    "iteration_*/decisions.jsonl",
)
GROWING = ("metrics.jsonl",)


class Ledger:
    """files.json of a run: bytes and SHA-256 of its stages' files.

    Attributes:
      directory: of the run.
      path: of the ledger.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.path = directory / NAME
        self._seen: dict[str, tuple[int, int]] = {}

    def record(self, names: Iterable[str] | None = None) -> None:
        """Records files as they are now.

        Args:
          names: relative to the directory; by default all that stages have left so far and that is not recorded as it is.
        """
        entries = self._entries()
        for name in self._found() if names is None else names:
            stat = (self.directory / name).stat()
            if self._seen.get(name) != (stat.st_size, stat.st_mtime_ns):
                entries[name] = {"bytes": stat.st_size, "sha256": _sha256(self.directory / name, stat.st_size)}
                self._seen[name] = stat.st_size, stat.st_mtime_ns
        write_json(self.path, entries)

    def verify(self, accepted: Sequence[str] = (), editable: Collection[str] = ()) -> list[str]:
        """Checks all recorded files that are there, and records those that were put there by hand.

        Args:
          accepted: names of files that were replaced on purpose.
          editable: names of files into which the method asks the user to write.

        Returns:
          Sentences about files that are taken though this run did not write them.

        Raises:
          InputError: a file was changed; it is named.
        """
        entries, found = self._entries(), self._found()
        if unknown := sorted(set(accepted) - set(found)):
            raise InputError(
                f"run.accept_replaced: {self.directory / unknown[0]} is no file that a stage wrote; such files are "
                f"{', '.join(found) or 'not there yet'}"
            )
        said, new = [], []
        for name in found:
            entry = entries.get(name)
            if entry is None:
                said.append(f"{self.directory / name}: is not recorded as this run's own; it is taken as it is")
                new.append(name)
            elif not self._same(name, entry):
                if name not in accepted and name not in editable:
                    raise InputError(
                        f"{self.directory / name}: was changed since this run wrote it; restore it, or, if you changed it "
                        f"on purpose, add --run.accept_replaced '[{name}]'"
                    )
                said.append(f"{self.directory / name}: was replaced, and is taken as it is")
                new.append(name)
        if new:
            self.record(new)
        return said

    def _same(self, name: str, entry: Any) -> bool:
        path = self.directory / name
        try:
            size, digest = int(entry["bytes"]), str(entry["sha256"])
        except (TypeError, KeyError, ValueError):
            raise InputError(f"{self.path}: was changed since it was written ({name}); restore it") from None
        actual = path.stat().st_size
        return (actual == size or (name in GROWING and actual > size)) and _sha256(path, size) == digest

    def _entries(self) -> dict[str, Any]:
        return read_json(self.path) if self.path.exists() else {}

    def _found(self) -> list[str]:
        paths = (path for pattern in (*ONCE, *GROWING) for path in self.directory.glob(pattern))
        return sorted(path.relative_to(self.directory).as_posix() for path in paths)


def _sha256(path: Path, size: int) -> str:
    """Computes the SHA-256 of a file's first bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, 1 << 20))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()
