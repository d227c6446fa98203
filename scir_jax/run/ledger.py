"""What finished stages wrote, by SHA-256, so that nothing that changed behind a run's back is taken for its own."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from scir_jax.config.schema import Config
from scir_jax.data.jsonl import read_json, write_json
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.errors import InputError
from scir_jax.run.directory import RunDirectory
from scir_jax.run.places import checkpoints_of

NAME = "files.json"
STAGES = {
    "sample": "responses.jsonl",
    "construct": "constructed.jsonl",
    "score": "pairs.jsonl",
    "optimise": "decisions.jsonl",
    "evaluate": "evaluation.json",
}
"""what a stage leaves in the directory of its iteration"""
OWN = ("manifest.json", "data.json")
GROWING = "metrics.jsonl"
"""grows with each stage, and is known up to where it was"""


def written_by_hand(config: Config, directory: RunDirectory) -> list[str]:
    """Lists files into which the method asks the user to write: pairs without external labels."""
    external = config.preference.labels == "external" and not config.data.pairs and not config.pairs.scorer
    store = ModelStore(directory.checkpoints)
    iterations = range(1, config.run.iterations + 1) if external else ()
    return [f"iteration_{t:02d}/{STAGES['score']}" for t in iterations if not store.exists(t + 1)]


class Ledger:
    """files.json of a run: bytes and SHA-256 of its stages' files.

    Attributes:
      directory: of the run.
      path: of the ledger.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.path = directory / NAME

    def record(self, names: Iterable[str]) -> None:
        """Records files as they are now.

        Args:
          names: relative to the directory; those that are not there are left out.
        """
        entries = self._entries()
        for name in names:
            path = self.directory / name
            if path.is_file():
                size = path.stat().st_size
                entries[name] = {"bytes": size, "sha256": _sha256(path, size)}
        write_json(self.path, entries)

    def record_stage(self, name: str, iteration: int) -> None:
        """Records what a stage left."""
        left = [f"iteration_{iteration:02d}/{STAGES[name]}"] if name in STAGES else []
        self.record([*left, GROWING])

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
                if name == GROWING:  # rows of a stage that is not done, which are written anew
                    continue
                # What the run writes of itself may have been written just before it was killed.
                if name not in OWN:
                    said.append(
                        f"{self.directory / name}: has no record (it was put there, or the run was stopped just then); "
                        "it is taken as it is"
                    )
                new.append(name)
            elif not self._same(name, entry):
                if name not in accepted and name not in editable:
                    raise InputError(
                        f"{self.directory / name}: is not what {self.path.name} says that this run wrote; restore it, "
                        f"or, if you changed it on purpose, add --run.accept_replaced '[{name}]'"
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
        return (actual == size or (name == GROWING and actual > size)) and _sha256(path, size) == digest

    def _entries(self) -> dict[str, Any]:
        return read_json(self.path) if self.path.exists() else {}

    def _found(self) -> list[str]:
        patterns = (*OWN, GROWING, *(f"iteration_*/{name}" for name in STAGES.values()))
        paths = (path for pattern in patterns for path in self.directory.glob(pattern))
        names = (path.relative_to(self.directory).as_posix() for path in paths)
        return sorted(name for name in names if self._whole(name))

    def _whole(self, name: str) -> bool:
        """Checks whether a file is more than a stage that is under way has written of it."""
        folder, _, file = name.rpartition("/")
        if file != STAGES["optimise"]:
            return True
        return ModelStore(checkpoints_of(self.directory)).exists(int(folder.removeprefix("iteration_")) + 1)


def _sha256(path: Path, size: int) -> str:
    """Computes the SHA-256 of a file's first bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, 1 << 20))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()
