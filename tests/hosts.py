"""Several hosts on this machine: processes that find each other, on the CPU."""

import dataclasses
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.forks import ROOT, Fork, environment


@dataclasses.dataclass(frozen=True)
class Done:
    """How a process ended: its exit code (minus the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line on stderr."""
        return (self.err.splitlines() or [""])[-1]


@dataclasses.dataclass(frozen=True)
class Kill:
    """Sends a signal to a host, once it has written a text on stdout or a file has appeared."""

    host: int
    when: str | Path
    signal: int = signal.SIGKILL


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _spawn(arguments: Sequence[str], *, env: dict[str, str], cwd: Path, out: Path, err: Path) -> subprocess.Popen:
    """An interpreter of its own."""
    with out.open("wb") as stdout, err.open("wb") as stderr:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=cwd, env=env)


def run_hosts(
    program: str | Sequence[str] | Callable[[int], Sequence[str]],
    count: int,
    *,
    env: dict[str, str] | None = None,
    kill: Sequence[Kill] = (),
    seconds: float = 120,
    cwd: Path | None = None,
    forked: bool = False,
) -> list[Done]:
    """Runs a program on every host until all have ended; what is left after `seconds` is killed and fails the test.

    Args:
      program: Python code, or the interpreter's arguments (["-m", "scir_jax.train", ...]), or such arguments by index.
      env: of every host, beside what makes them hosts; by default each has two devices.
      kill: a host that was stopped by SIGSTOP is killed when the others have ended.
      forked: the hosts begin with the package imported; see tests.forks.
    """
    address = f"127.0.0.1:{free_port()}"
    env = {"JAX_NUM_CPU_DEVICES": "2", **(env or {}), "JAX_COORDINATOR_ADDRESS": address}
    env = environment(**env, JAX_NUM_PROCESSES=str(count))
    waiting, stopped, killed = list(kill), set(), set()
    with tempfile.TemporaryDirectory() as directory:
        files = [(Path(directory, f"{host}.out"), Path(directory, f"{host}.err")) for host in range(count)]
        processes: list[subprocess.Popen | Fork] = []
        end = time.monotonic() + seconds
        try:
            for host, (out, err) in enumerate(files):
                arguments = program(host) if callable(program) else program
                arguments = ["-c", arguments] if isinstance(arguments, str) else list(map(str, arguments))
                own = {"JAX_PROCESS_ID": str(host), **env}
                processes.append((Fork if forked else _spawn)(arguments, env=own, cwd=cwd or ROOT, out=out, err=err))
            while any(process.poll() is None for host, process in enumerate(processes) if host not in stopped):
                if time.monotonic() > end:
                    break
                for one in list(waiting):
                    out = files[one.host][0].read_text(errors="replace")
                    if one.when.exists() if isinstance(one.when, Path) else one.when in out:
                        waiting.remove(one)
                        processes[one.host].send_signal(one.signal)
                        stopped |= {one.host} if one.signal == signal.SIGSTOP else set()
                time.sleep(0.02)
        finally:
            for host, process in enumerate(processes):
                if process.poll() is None:
                    killed |= {host} - stopped
                    process.kill()
                process.wait()
        done = [
            Done(process.returncode, out.read_text(errors="replace"), err.read_text(errors="replace"))
            for process, (out, err) in zip(processes, files)
        ]
    report = "\n".join(f"host {host}: {one.code}\n{one.out}\n{one.err}" for host, one in enumerate(done))
    assert not killed, f"hosts {sorted(killed)} still ran after {seconds} s\n{report}"
    assert not waiting, f"never seen: {[one.when for one in waiting]}\n{report}"
    return done
