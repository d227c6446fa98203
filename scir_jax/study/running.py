"""Makes the runs of a plan: each a process of the train command with cores of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from scir_jax.config.files import to_yaml
from scir_jax.data.jsonl import read_json
from scir_jax.errors import DIVERGED, InputError, Interrupted
from scir_jax.run import console
from scir_jax.study.plan import START, Job, Plan

PROGRAM = ("-m", "scir_jax.train")
CACHE_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""of small models many programs compile in less than the second from which JAX keeps them"""
LAST_LINES = 5
"""of a failed run's log that are shown"""
PAUSE = 0.2
"""seconds between two looks at the runs under way"""
PATIENCE = 10.0
"""seconds that a run has to end when the study is stopped at once"""
SAVE = 300.0
"""seconds after which the tables are written again while runs go on"""


class Failure(NamedTuple):
    """A run that failed.

    Attributes:
      job: which.
      code: exit code of its process.
      lines: the last ones of its log.
    """

    job: Job
    code: int
    lines: list[str]


class Process:
    """The process of a run.

    Attributes:
      code: its exit code, None while it runs.
      used: processor seconds, known when it has ended.
    """

    def __init__(self, file: Path, log: Path, cores: set[int]):
        """
        Args:
          file: the run's configuration.
          log: what it prints is added here.
          cores: that it may use; all where there are none.
        """
        self.code: int | None = None
        self.used = 0.0
        before = os.sched_getaffinity(0) if cores else set()
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # a process begins with the cores of the one that makes it
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, *PROGRAM, "--config", str(file)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**CACHE_ALL, **os.environ},
                    start_new_session=True,  # a terminal's Ctrl-C reaches the study alone, which passes it on
                )
        finally:
            if cores:
                os.sched_setaffinity(0, before)

    def ended(self) -> bool:
        """Checks whether it has ended."""
        if self.code is None:
            pid, status, used = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self.used = used.ru_utime + used.ru_stime
        return self.code is not None

    def signal(self, number: int) -> None:
        """Sends it a signal while it runs."""
        if not self.ended():
            os.kill(self._process.pid, number)


class _Running:
    """A run under way, or one that waits for the process of an earlier, killed study."""

    def __init__(self, job: Job):
        self.job = job
        self.process: Process | None = None
        self.started = time.monotonic()


def run_all(plan: Plan, save: Callable[[], object]) -> list[Failure]:
    """Makes all runs that are not finished, `study.jobs` at a time.

    Args:
      save: writes what is known, now and then.

    Returns:
      The runs that failed; those that need them are not made.

    Raises:
      Interrupted: on Ctrl-C or SIGTERM, after the runs under way have saved what they did.
    """
    shares = _shares(plan.study.jobs)
    running: dict[int, _Running] = {}
    failures: list[Failure] = []
    everything = plan.jobs(all_of_them=True)
    done = sum(job.decided and plan.finished(job) for job in everything)
    saved = time.monotonic()
    with console.Stopper() as stopper, console.stage("runs", len(everything), done, window=7200) as bar:
        told = False
        try:
            while True:
                busy = {one.job.directory for one in running.values()}
                failed = {failure.job.directory for failure in failures}
                for slot in range(plan.study.jobs):
                    if slot in running or stopper.signal is not None:
                        continue
                    if (job := plan.next(busy, failed)) is None:
                        break
                    running[slot] = _Running(job)
                    busy.add(job.directory)
                    if _locked(job.directory):
                        console.say(f"{job.directory}: a process of an earlier study is at work here; waiting for it")
                if not running:
                    break
                if stopper.signal is not None and not told:
                    told = True
                    _end(running)
                for slot, one in list(running.items()):
                    if not _advance(one, shares[slot], stopper.signal is not None):
                        continue
                    del running[slot]
                    if one.process is None:
                        continue
                    failure = _ended(plan, one)
                    if stopper.signal is not None:
                        continue  # that it did not finish is no failure
                    failures += [failure] if failure else []
                    everything = plan.jobs(all_of_them=True)
                    bar.advance(one.job.title, by=0 if failure else 1, total=len(everything))
                    done += not failure
                    console.say(f"{done}/{len(everything)}  {_line(plan, one, failure)}")
                if time.monotonic() - saved > SAVE:
                    saved = time.monotonic()
                    save()
                time.sleep(PAUSE)
        finally:
            _end(running, PATIENCE)
        if stopper.signal is not None:
            save()
            raise Interrupted("stopped; the same command goes on where it was", stopper.signal)
    return failures


def _advance(one: _Running, cores: set[int], stopping: bool) -> bool:
    """Begins the process of a run when its directory is free, and looks whether it has ended."""
    if one.process is not None:
        return one.process.ended()
    if stopping:
        return True
    if not _locked(one.job.directory):
        one.job.directory.parent.mkdir(parents=True, exist_ok=True)
        file, log = (beside(one.job.directory, suffix) for suffix in ("yaml", "log"))
        file.write_text(to_yaml(one.job.config), encoding="utf-8")
        one.started = time.monotonic()
        one.process = Process(file, log, cores)
    return False


def _ended(plan: Plan, one: _Running) -> Failure | None:
    """Records how a run ended."""
    job, code = one.job, one.process.code
    attempt = {
        "iterations": job.iterations,
        "seconds": round(time.monotonic() - one.started, 1),
        "processor_seconds": round(one.process.used, 2),
        "code": code,
    }
    lines = beside(job.directory, "log").read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.rstrip() for line in lines if line.strip()][-LAST_LINES:]
    if code == DIVERGED:
        plan.keep(job, attempt, {"diverged": lines[-1]})
        return None
    if code:
        plan.keep(job, attempt, {})
        return Failure(job, code, lines)
    summary = read_json(job.directory / "summary.json")
    found: dict[str, Any] = {name: summary[name] for name in ("rows", "costs") if name in summary}
    plan.keep(job, attempt, found | {"iterations": job.iterations})
    return None


def _line(plan: Plan, one: _Running, failure: Failure | None) -> str:
    record = plan.record(one.job)
    took = f"{time.monotonic() - one.started:.0f} s"
    if failure:
        return f"{one.job.title}: FAILED after {took}, exit code {failure.code}: {(failure.lines or ['no output'])[-1]}"
    if record.get("diverged"):
        return f"{one.job.title}: diverged after {took}"
    value = record["rows"][-1].get(plan.study.by)
    found = "" if value is None or one.job.kind == START else f", {plan.study.by} {value:.3f}"
    return f"{one.job.title}: {took}{found}"


def _end(running: dict[int, _Running], patience: float | None = None) -> None:
    """Asks the processes under way to end; those that have not after so many seconds are killed."""
    processes = [one.process for one in running.values() if one.process is not None]
    for process in processes:
        process.signal(signal.SIGTERM)
    until = time.monotonic() + (patience or 0)
    while patience and (processes := [process for process in processes if not process.ended()]):
        if time.monotonic() > until:
            for process in processes:
                process.signal(signal.SIGKILL)
        time.sleep(PAUSE)


def beside(directory: Path, suffix: str) -> Path:
    """Returns the file beside a run's directory."""
    return directory.with_name(f"{directory.name}.{suffix}")


def _shares(jobs: int) -> list[set[int]]:
    """Divides the cores among the runs under way: sharing them costs more than it gives.

    Returns:
      The cores of each; empty where there are fewer than runs, or where the system does not tell.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::jobs]) if len(cores) >= jobs else set() for i in range(jobs)]


def _locked(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    try:
        with FileLock(directory / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True


def lock(output: Path) -> FileLock:
    """Locks the directory of a study; the kernel frees it when the process ends.

    Raises:
      InputError: another process uses it, or it is a file or may not be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = FileLock(output / ".lock")
        held.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"--output {output}: another ablate is running here; wait for it, or take another one"
        ) from None
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}; take another directory") from None
    return held


# --- how long it takes ----------------------------------------------------------------------------------------------

ASSUMED = {"start": 150.0, "iteration": 30.0, "begin": 30.0}
"""seconds of a start, of an iteration, and of a run beside its iterations, where nothing is finished yet"""


def hours(plan: Plan, jobs: list[Job]) -> tuple[float, bool]:
    """Estimates how long runs take together, from those of the study that are finished.

    Returns:
      Hours, and whether any run is finished that they rest on; else they rest on ASSUMED.
    """
    starts: list[float] = []
    each: dict[str, list[float]] = {}
    for job in plan.jobs():
        if not plan.finished(job) or not plan.record(job).get("attempts"):
            continue
        spent = sum(attempt["seconds"] for attempt in plan.record(job)["attempts"])
        if job.needs is None:
            starts.append(spent)
        else:
            each.setdefault(job.method, []).append(spent / plan.record(job).get("iterations", job.iterations))
    everything = [seconds for values in each.values() for seconds in values]
    total = 0.0
    for job in jobs:
        if job.needs is None:
            total += _mean(starts, ASSUMED["start"])
        elif values := each.get(job.method, everything):
            total += _mean(values, 0) * job.iterations
        else:
            total += ASSUMED["begin"] + ASSUMED["iteration"] * job.iterations
    return total / plan.study.jobs / 3600, bool(starts or everything)


def _mean(values: list[Any], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
