"""A run in a bucket: its small files have a working copy on each host, its checkpoints lie in the bucket alone.

A run writes its files as on a disk. `push` brings what has changed into the bucket, in the order in which it was
written, each object whole. So whatever a process that is killed leaves there is what it would have left on a disk at
some moment before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from scir_jax.bucket.lease import Lease
from scir_jax.bucket.objects import Folder, in_bucket, local_directory

APART = ("checkpoints", "wandb")
"""directories of a run that have no working copy"""
LAST = ("config.json", "adapter_config.json")
"""what makes files an exported model: it comes after them"""
REMOTE = ("export/", ".safetensors")
"""exported weights stay in the bucket: they begin and end so"""

_copies: dict[str, WorkingCopy] = {}


class WorkingCopy:
    """The files of a run in a bucket, on this host.

    Attributes:
      folder: in the bucket.
      path: the directory here; it is removed when the process ends.
      lease: of this process, without which nothing is written where there is one.
      pushed: when that was last, in seconds of the monotonic clock.
    """

    def __init__(self, url: str):
        self.folder = Folder(url)
        self.path = local_directory(url)
        self.lease: Lease | None = None
        self.pushed = time.monotonic()
        self._known: dict[str, tuple[int, int, int] | None] = {}
        self._news: dict[str, None] = {}
        self.pull()

    def pull(self, names: Iterable[str] | None = None) -> None:
        """Brings objects here, over what is here of those names.

        Args:
          names: relative to the run; all there are by default, and then nothing else stays here.
        """
        if names is None:
            names = [name for name in self.folder.names() if not _apart(name)]
            for name in set(self._here()) - set(names):
                (self.path / name).unlink()
            self._known = {}
        for name in names:
            path = self.path / name
            if name.startswith(REMOTE[0]) and name.endswith(REMOTE[1]):
                self._known[name] = None
            elif self.folder.download(name, path):
                self._known[name] = _state(path)
            else:
                path.unlink(missing_ok=True)
                self._known.pop(name, None)

    def push(self) -> list[str]:
        """Brings what has changed here into the bucket -> names of what was written or deleted there."""
        here = self._here()
        states = {name: _state(path) for name, path in here.items()}
        changed = [name for name in here if states[name] != self._known.get(name)]
        changed.sort(key=lambda name: (name.rpartition("/")[2] in LAST, states[name][0]))
        gone = [name for name, state in self._known.items() if state is not None and name not in here]
        if any(name.startswith(REMOTE[0]) for name in changed):  # another model's, or one in other parts
            gone += [name for name, state in self._known.items() if state is None and name not in here]
        if self.lease is not None and (changed or gone):
            self.lease.check()
        for name in changed:
            self.folder.upload(name, here[name])
            self._known[name] = states[name]
        for name in gone:
            self.folder.delete(name)
            del self._known[name]
        self.pushed = time.monotonic()
        self._news |= dict.fromkeys(changed + gone)
        return changed + gone

    def news(self) -> list[str]:
        """Returns the names of all that was pushed since the last call, after a push."""
        self.push()
        found, self._news = list(self._news), {}
        return found

    def _here(self) -> dict[str, Path]:
        paths = (path for path in self.path.rglob("*") if path.is_file())
        found = {path.relative_to(self.path).as_posix(): path for path in paths}
        return {name: path for name, path in found.items() if not _apart(name)}


def place(name: str | Path) -> Path:
    """Returns the directory of a run: where it lies, or its working copy here.

    Raises:
      InputError: it is in no bucket that can be read, or of another scheme than gs://.
    """
    if not in_bucket(name):
        return Path(name)
    url = str(name).rstrip("/")
    if url not in _copies:
        _copies[url] = WorkingCopy(url)
    return _copies[url].path


def copy_of(path: Path) -> WorkingCopy | None:
    """Returns the working copy that a path lies in, None for a path of a disk."""
    return next((copy for copy in _copies.values() if path == copy.path or copy.path in path.parents), None)


def _apart(name: str) -> bool:
    """Checks whether a file belongs to no working copy: hidden ones do not, which are a process's own."""
    parts = name.split("/")
    return parts[0] in APART or any(part.startswith(".") for part in parts)


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
