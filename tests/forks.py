"""Processes forked from one that has imported the package: they start in a moment, and end as any interpreter does.

What is imported starts no thread of Python and no backend of JAX, so that a fork is a whole process. All forks of one
server have its seed of hashes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
CLUSTER = ("JAX_", "SLURM_", "OMPI_", "MEGASCALE_", "TPU_", "XLA_FLAGS", "KUBERNETES_")
# What the commands import, some of it not before they need it.
MODULES = (
    "scir_jax.train",
    "scir_jax.report.page",
    "scir_jax.run.base_model",
    "scir_jax.run.export",
    "scir_jax.run.iteration",
    "scir_jax.run.preflight",
    "matplotlib.backends.backend_svg",
    "tensorboardX",
    "transformers.models.auto.tokenization_auto",
)


def environment(**variables: str) -> dict[str, str]:
    """Returns this process's without what says something of clusters, on the CPU, without proxies, which JAX warns of."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(CLUSTER) and not name.lower().endswith("_proxy")
    }
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **variables}


def quick(devices: int = 1, **variables: str) -> dict[str, str]:
    """Returns the variables of a process with so many devices that compiles little, and nothing that was kept."""
    return {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **variables,
    }


def share_programs() -> None:
    """Lets this process take from JAX's cache what another host of the same devices compiled.

    Else each host of a CPU has keys of its own there, and only the first host writes.
    """
    from jax._src import cache_key

    def kinds(hashed, devices) -> None:
        hashed.update(str([device.device_kind for device in devices.flat]).encode())

    cache_key._hash_accelerator_config = kinds


def look_seldom_for_garbage() -> None:
    """Saves the time that Python takes to walk through what JAX traces, again and again, for hardly any garbage."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


class Fork:
    """A forked process, to be used like a subprocess.Popen.

    Args:
      arguments: an interpreter's: "-c" and code, or "-m" and a module, and the program's own.
      env: its whole environment.
      cwd: its working directory.
      out, err: files for what it writes.
    """

    def __init__(self, arguments: Sequence[object], *, env: dict[str, str], cwd: Path, out: Path, err: Path):
        self.returncode: int | None = None
        server = _server()
        self._report = Path(server.directory.name, str(next(server.numbers)))
        for path in (out, err, self._report):
            path.write_bytes(b"")
        request = dict(arguments=list(map(str, arguments)), env=env)
        request |= {name: str(path) for name, path in dict(cwd=cwd, out=out, err=err, report=self._report).items()}
        with contextlib.suppress(BrokenPipeError):
            server.process.stdin.write(json.dumps(request).encode() + b"\n")
            server.process.stdin.flush()
        while not (lines := self._lines()):
            assert server.process.poll() is None, server.said()
            time.sleep(0.005)
        self.pid = int(lines[0])

    def poll(self) -> int | None:
        """Returns the exit code, minus the signal that ended it; None while it runs."""
        if self.returncode is None and len(lines := self._lines()) == 2:
            self.returncode = int(lines[1])
            self._report.unlink()
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Returns the exit code when it has ended; subprocess.TimeoutExpired where it has not in so many seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends it a signal while it runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, which is not written yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it."""
        self.send_signal(signal.SIGKILL)

    def _lines(self) -> list[str]:
        """What is known of it: its number, and its exit code once it has ended."""
        text = self._report.read_text()
        return text.splitlines() if text.endswith("\n") else []


class _Server:
    """The process that forks; it ends with this one."""

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory(prefix="forks-")
        self.numbers = itertools.count()
        self._written: IO[bytes] = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=self._written,
            stderr=self._written,
            cwd=ROOT,
            env=environment(),
        )

    def said(self) -> str:
        """Returns what it wrote."""
        self._written.seek(0)
        return self._written.read().decode(errors="replace")


_server = functools.cache(_Server)


def _serve() -> list[str]:
    """Forks a process for every request on stdin, and returns in it what it shall run."""
    for name in MODULES:
        importlib.import_module(name)
    from scir_jax import train
    from scir_jax.config import cli

    share_programs()
    cli.parse("train", train.__doc__, [], default_config=cli.QUICKSTART)  # the parser is made once for all
    look_seldom_for_garbage()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.buffer.readline():
        if not os.fork():
            # Between the two: it waits, and tells how the process ended.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request = json.loads(line)
            if not (pid := os.fork()):
                return _become(**request)
            with open(request["report"], "w", encoding="ascii") as report:
                print(pid, file=report, flush=True)
                print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=report, flush=True)
            os._exit(0)
    os._exit(0)


def _become(arguments: list[str], env: dict[str, str], cwd: str, out: str, err: str, report: str) -> list[str]:
    """Gives this process its files, its directory and its environment, of which JAX has read another."""
    os.chdir(cwd)
    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    config = sys.modules["jax"].config
    for name, value in env.items():
        if name.startswith("JAX_") and (option := name.lower()) in config.values:
            kind = type(config.values[option])
            known = value in ("1", "true") if kind is bool else kind(value) if kind in (int, float) else value
            config.update(option, known)
    return arguments


if __name__ == "__main__":
    kind, what, *rest = _serve()
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
