"""Models and data in a bucket: small files are fetched, weights are read by ranges of bytes where they are needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from scir_jax.bucket.objects import Folder, local_directory
from scir_jax.errors import InputError

SMALL = (".json", ".jinja", ".model", ".txt")
"""files of a model directory that are fetched: configurations, templates, vocabularies"""
WEIGHTS = ".safetensors"
ADAPTER = "adapter_model.safetensors"
"""small weights, which are fetched"""
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
PART = 64 * 2**20
"""bytes that are read at once at most"""
HEADER = 100 * 2**20
"""bytes of a header at most; the format's own limit"""

_found: dict[str, Path] = {}
_weights: dict[Path, tuple[Folder, str]] = {}


def model_directory(url: str) -> Path:
    """Returns a directory with a model's small files; its weights are empty files, which `weights_of` knows.

    Raises:
      InputError: there is nothing of that address, or it cannot be read.
    """
    if url not in _found:
        folder = Folder(url)
        names = [name for name in folder.names() if "/" not in name]
        if not names:
            raise InputError(f"{url}: there is no such model directory")
        path = local_directory(url)
        for name in names:
            if name.endswith(WEIGHTS) and name != ADAPTER:
                (path / name).touch()
                _weights[path / name] = (folder, name)
            elif name.endswith((*SMALL, WEIGHTS)):
                folder.download(name, path / name)
        _found[url] = path
    return _found[url]


def data(url: str) -> Path:
    """Fetches a file, or the files of a directory -> its path here.

    Raises:
      InputError: there is nothing of that address, or it cannot be read.
    """
    if url not in _found:
        around, _, name = url.rstrip("/").rpartition("/")
        path = local_directory(around)
        if not (around.startswith("gs://") and Folder(around).download(name, path / name)):
            folder = Folder(url)
            names = folder.names()
            if not names:
                raise InputError(f"{url}: no such file")
            for inner in names:
                folder.download(inner, path / name / inner)
        _found[url] = path / name
    return _found[url]


class Weights(NamedTuple):
    """A safetensors file in a bucket.

    Attributes:
      folder: where it lies.
      name: of the object.
    """

    folder: Folder
    name: str

    def holds(self) -> tuple[int, str]:
        """Returns what the store says the file holds: how many bytes, and their CRC32C."""
        return self.folder.holds(self.name)

    def tensors(self) -> dict[str, Slices]:
        """Reads the file's header -> its tensors, of which nothing is read yet.

        Raises:
          InputError: it is no safetensors file.
        """
        try:
            (size,) = struct.unpack("<Q", self.folder.read(self.name, 0, 8) or b"")
            if size > HEADER:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(self.folder.read(self.name, 8, 8 + size) or b"")
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: Slices(self, 8 + size, entry) for name, entry in entries.items()}
        except (struct.error, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.folder.url}/{self.name}: this is not a readable safetensors file ({error}); export it again"
            ) from error


class Slices:
    """A tensor in a bucket; what it is indexed with is read, with whole rows."""

    def __init__(self, file: Weights, start: int, entry: dict[str, Any]):
        self._file, self._start = file, start + int(entry["data_offsets"][0])
        self._shape, self._dtype = tuple(entry["shape"]), str(entry["dtype"])

    def get_shape(self) -> tuple[int, ...]:
        """Returns the tensor's shape."""
        return self._shape

    def get_dtype(self) -> str:
        """Returns the name that the format has for its dtype."""
        return self._dtype

    def __getitem__(self, index: slice | Sequence[slice]) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if self._dtype not in DTYPES:
            raise InputError(f"{self._file.folder.url}/{self._file.name}: a tensor has dtype {self._dtype}")
        dtype = np.dtype(DTYPES[self._dtype])
        first, rest = index[0], tuple(index[1:])
        start, stop, _ = first.indices(self._shape[0])
        row = dtype.itemsize * int(np.prod(self._shape[1:], dtype=np.int64))
        together = max(PART // max(row, 1), 1)
        shape = (max(stop - start, 0), *self._shape[1:])
        found = np.empty(np.empty(shape, np.bool_)[(slice(None), *rest)].shape if rest else shape, dtype)
        for at in range(start, stop, together):
            end = min(at + together, stop)
            content = self._file.folder.read(self._file.name, self._start + at * row, self._start + end * row)
            if content is None or len(content) != (end - at) * row:
                raise InputError(f"{self._file.folder.url}/{self._file.name}: ends before its tensors do")
            part = np.frombuffer(content, dtype).reshape(end - at, *self._shape[1:])
            found[at - start : end - start] = part[(slice(None), *rest)]
        return found


def weights_of(path: Path) -> Weights | None:
    """Returns the file in a bucket that a path stands for, None for a file of a disk."""
    return Weights(*_weights[path]) if path in _weights else None
