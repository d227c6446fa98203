"""Objects below gs://BUCKET/PATH: read, written whole, listed, deleted."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from scir_jax.errors import InputError, Unavailable

T = TypeVar("T")

SCHEME = "gs://"
LARGE = 64 * 2**20
"""bytes; a file of more is uploaded in parts"""
EXTRAS = ("gcsfs", "google.cloud.storage")
CLIENTS = ("gcsfs", "google", "aiohttp", "requests", "urllib3")

_local: dict[str, str] = {}
"""directory here -> the address whose objects it holds"""


def in_bucket(name: Any) -> bool:
    """Checks whether a name is that of something in a bucket.

    Raises:
      InputError: it has another scheme than gs://.
    """
    name = str(name)
    if name.startswith(SCHEME):
        return True
    scheme, found, _ = name.partition("://")
    if found and scheme.isalnum():
        raise InputError(f"{name}: of buckets only {SCHEME}BUCKET/PATH is read and written; give one, or a directory")
    return False


def local_directory(url: str) -> Path:
    """Makes a directory for objects of an address; it is removed when the process ends."""
    path = Path(tempfile.mkdtemp(prefix="scir_jax-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    _local[str(path)] = url.rstrip("/")
    return path


def shown(text: Any) -> str:
    """Writes the addresses of a bucket into a text, where it has directories that hold their objects here."""
    text = str(text)
    for path, url in _local.items():
        text = text.replace(path, url)
    return text


def refusal(error: BaseException | None) -> str | None:
    """Says what a store refused, where an exception tells of it, which other packages' clients raise too."""
    while error is not None:
        said = " ".join(str(error).split())
        if type(error).__module__.startswith(CLIENTS) or "http_response_code" in said or SCHEME in said:
            return (
                f"the bucket does not answer as it should; what was written before is intact, the same command goes on "
                f"({said[:200]})"
            )
        error = error.__cause__ or error.__context__
    return None


class Folder:
    """The objects whose names begin with a path.

    Attributes:
      url: gs://BUCKET/PATH without a slash at its end.
      bucket: its name.
      prefix: "PATH/", or "" for the whole bucket.
    """

    def __init__(self, url: str):
        """
        Raises:
          InputError: the address names no bucket, or the packages of the extra [gcs] are not installed.
        """
        self.bucket, _, path = url.removeprefix(SCHEME).rstrip("/").partition("/")
        self.url = f"{SCHEME}{self.bucket}" + (f"/{path}" if path else "")
        if not self.bucket or (path and "" in path.split("/")):
            raise InputError(f"{url}: is no address in a bucket; write {SCHEME}BUCKET/PATH")
        for package in EXTRAS:
            if not _installed(package):
                raise InputError(f"{url}: a bucket needs the extra [gcs]: pip install 'scir_jax[gcs]'")
        self.prefix = f"{path}/" if path else ""
        # What they log is raised too, and becomes one sentence.
        for name in ("gcsfs", "google.auth"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        import tensorstore

        self._store = self._ask(
            lambda: tensorstore.KvStore.open(
                {"driver": "gcs", "bucket": self.bucket, "path": self.prefix},
                context=tensorstore.Context({"gcs_request_retries": {"max_retries": 8}}),
            ).result()
        )

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Reads an object, or its bytes from `start` up to `end`; None where there is none.

        Raises:
          InputError: it may not be read, or there is no such bucket.
          Unavailable: the bucket does not answer.
        """
        return self.read_generation(name, start, end)[0]

    def read_generation(self, name: str, start: int = 0, end: int | None = None) -> tuple[bytes | None, bytes]:
        """Reads an object as `read` does, and its generation, which a condition of `write` and `delete` may name."""
        part = slice(start, end) if start or end is not None else None
        found = self._ask(lambda: self._store.read(name, byte_range=part).result())
        return (found.value if found.state == "value" else None), found.stamp.generation

    def write(self, name: str, content: bytes, if_generation: bytes | None = None) -> bytes | None:
        """Writes an object whole.

        Args:
          if_generation: write only over this generation of it.

        Returns:
          Its new generation, None where it has another generation than `if_generation`.

        Raises:
          InputError: it may not be written, or there is no such bucket.
          Unavailable: the bucket does not answer.
        """
        stamp = self._ask(lambda: self._store.write(name, content, if_equal=if_generation).result())
        if stamp.generation or if_generation is None:
            return stamp.generation
        # A request that was sent again because its answer was lost finds its own object.
        found, generation = self.read_generation(name)
        return generation if found == content else None

    def delete(self, name: str, if_generation: bytes | None = None) -> None:
        """Deletes an object, if it is there and has the generation."""
        self._ask(lambda: self._store.write(name, None, if_equal=if_generation).result())

    def probe(self) -> None:
        """Tries to write, read and delete an object of a name that nothing else has.

        Raises:
          InputError: one of it is not allowed, or there is no such bucket.
          Unavailable: the bucket does not answer.
        """
        name = f".probe-{secrets.token_hex(8)}"
        self.write(name, b"probe")
        self.read(name)
        self.delete(name)

    def names(self) -> list[str]:
        """Lists the objects, in order of their names."""
        return sorted(name.decode() for name in self._ask(lambda: self._store.list().result()))

    def upload(self, name: str, path: Path) -> None:
        """Writes a file as an object: a large one in parts, of which nothing is seen before the last."""
        if path.stat().st_size <= LARGE:
            self.write(name, path.read_bytes())
        else:
            self._ask(lambda: self._blob(name).upload_from_filename(str(path)))

    def download(self, name: str, path: Path) -> bool:
        """Reads an object into a file; False where there is none."""
        content = self.read(name)
        if content is None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return True

    def holds(self, name: str) -> tuple[int, str]:
        """Returns what the store says an object holds: how many bytes, and their CRC32C."""

        def ask() -> tuple[int, str]:
            blob = self._blob(name)
            blob.reload()
            return blob.size, blob.crc32c

        return self._ask(ask)

    def _blob(self, name: str) -> Any:
        from google.cloud import storage

        return storage.Client().bucket(self.bucket).blob(self.prefix + name, chunk_size=16 * 2**20)

    def _ask(self, request: Callable[[], T]) -> T:
        """Sends a request; what the store refuses becomes one sentence."""
        try:
            return request()
        except Exception as error:
            said = " ".join(str(error).split())
            if "403" in said or "401" in said or "PERMISSION_DENIED" in said or "Credentials" in type(error).__name__:
                raise InputError(
                    f"{self.url}: may not be read and written by this account; give it roles/storage.objectUser and "
                    f"roles/storage.legacyBucketReader on {SCHEME}{self.bucket} ({said[:120]})"
                ) from error
            if "404" in said or "NOT_FOUND" in said:
                raise InputError(f"{self.url}: there is no bucket {self.bucket} ({said[:120]})") from error
            raise Unavailable(f"{self.url}: {refusal(error) or said[:200]}") from error


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
