"""The right to write a run in a bucket: one object, written by its holder again and again, for one process at a time."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from scir_jax.bucket.objects import Folder
from scir_jax.errors import UNAVAILABLE, InputError, Unavailable

NAME = ".lease"


class Lease:
    """A lease on a folder.

    Its holder writes it anew every sixth of its time, and ends its own process where it could not for two thirds of it,
    or where somebody else has it. Who finds a lease takes it over once it stood unchanged for its whole time, by the
    finder's own clock: clocks of different machines are not compared. What a process of this machine that is gone held
    is free at once.
    """

    def __init__(self, folder: Folder, seconds: float):
        self._folder, self._seconds = folder, seconds
        self._generation = b""
        self._renewed = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, waiting: Callable[[str], None] = lambda sentence: None) -> None:
        """Takes the lease, and keeps it until `release`.

        Args:
          waiting: is told once why it takes time.

        Raises:
          InputError: another process writes it, or it cannot be written.
        """
        content, generation = self._folder.read_generation(NAME)
        if content is not None and not _holder_is_gone(content):
            end = time.monotonic() + self._seconds
            waiting(
                f"{self._folder.url}: {_holder(content)} has a lease on it; if that process is gone, the run goes on "
                f"here in {self._seconds:.0f} s"
            )
            while time.monotonic() < end:
                time.sleep(min(self._seconds / 12, max(end - time.monotonic(), 0)))
                now, newer = self._folder.read_generation(NAME)
                if now is None:
                    content, generation = now, newer
                    break
                if newer != generation:
                    raise InputError(
                        f"{self._folder.url}: {_holder(now)} is running here; wait for it or choose another "
                        "run.directory"
                    )
        started = time.monotonic()
        written = self._folder.write(NAME, self._mine(), generation)
        if written is None:
            raise InputError(
                f"{self._folder.url}: another process took it just now; wait for it or choose another run.directory"
            )
        self._generation, self._renewed = written, started
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the lease up."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            self._folder.delete(NAME, self._generation)

    def check(self) -> None:
        """Ends the process if the lease may be somebody else's by now."""
        if time.monotonic() - self._renewed > self._seconds * 2 / 3:
            self._end("it could not be renewed in time")

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds / 6):
            started = time.monotonic()
            # A request may hang: the time is watched beside it.
            watch = threading.Timer(max(self._renewed + self._seconds * 2 / 3 - started, 0.1), self.check)
            watch.daemon = True
            watch.start()
            try:
                written = self._folder.write(NAME, self._mine(), self._generation)
            except (InputError, Unavailable):
                self.check()
                continue
            finally:
                watch.cancel()
            if written is None:
                self._end("another process has it now")
            else:
                self._generation, self._renewed = written, started

    def _mine(self) -> bytes:
        own = {"host": socket.gethostname(), "process": os.getpid(), **_machine()}
        # No two writings are alike: by its content a holder knows its own.
        return json.dumps(own | {"token": secrets.token_hex(8)}).encode()

    def _end(self, why: str) -> None:
        print(
            f"error: {self._folder.url}: the lease on it is lost ({why}); this process ends before it writes more, and "
            "the same command goes on from what was saved",
            file=sys.stderr,
            flush=True,
        )
        os._exit(UNAVAILABLE)


def _machine() -> dict[str, str]:
    """Says which machine, and which of its containers, this process sees the processes of."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return {"boot": boot, "processes": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {}


def _holder_is_gone(content: bytes) -> bool:
    """Checks whether a lease is that of a process of this machine that is no more."""
    held, machine = _read(content), _machine()
    if not machine or any(held.get(key) != value for key, value in machine.items()):
        return False
    try:
        status = Path(f"/proc/{int(held['process'])}/status").read_text(encoding="utf-8", errors="replace")
    except (OSError, KeyError, ValueError):
        return True
    return "zombie" in status


def _holder(content: bytes) -> str:
    held = _read(content)
    return f"process {held.get('process', '?')} on {held.get('host', '?')}"


def _read(content: bytes) -> dict:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
