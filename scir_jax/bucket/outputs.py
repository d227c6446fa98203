"""Files and directories that a command writes into a bucket: made here, and brought there when the command succeeds."""

from __future__ import annotations

from pathlib import Path

from scir_jax.bucket.objects import Folder, in_bucket, local_directory
from scir_jax.bucket.working import LAST

_outputs: dict[Path, tuple[str, str]] = {}


def output(name: str | Path) -> Path:
    """Returns where to write what becomes an object, or the objects of a directory; a path of a disk as it is.

    Raises:
      InputError: the address names no bucket, or it may not be written.
    """
    if not in_bucket(name):
        return Path(name)
    around, _, last = str(name).rstrip("/").rpartition("/")
    Folder(around).probe()  # what is not allowed is better said before the work than after it
    path = local_directory(around) / last
    _outputs[path] = (around, last)
    return path


def upload() -> None:
    """Brings all that was written for a bucket there; of a model directory its configuration comes last."""
    for path, (around, name) in _outputs.items():
        folder = Folder(around)
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        for file in sorted(files, key=lambda file: file.name in LAST):
            folder.upload(f"{name}/{file.relative_to(path).as_posix()}" if file != path else name, file)
    _outputs.clear()
