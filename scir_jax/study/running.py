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


def run_all(plan: Plan, save: Callable[[], object]) -> list[Failure]:
    """Makes all runs that are not finished, `study.jobs` at a time.

    Args:
      save: writes what is known, now and then.

    Returns:
      The runs that failed; those that need them are not made.

    Raises:
      Interrupted: on Ctrl-C or SIGTERM, after the runs under way have saved what they did.
    """
    jobs = plan.jobs(all_of_them=True)
    done = sum(job.decided and plan.finished(job) for job in jobs)
    with console.Stopper() as stopper, console.stage("runs", len(jobs), done, window=7200) as bar:
        work, saved = _Work(plan, stopper, bar, done), time.monotonic()
        try:
            while work.goes_on():
                work.look()
                if time.monotonic() - saved > SAVE:
                    saved = time.monotonic()
                    save()
                time.sleep(PAUSE)
        finally:
            work.end(PATIENCE)
        if stopper.signal is not None:
            save()
            raise Interrupted("stopped; the same command goes on where it was", stopper.signal)
    return work.failures


class _Running:
    """A run under way, or one that waits for the process of an earlier, killed study."""

    def __init__(self, plan: Plan, job: Job, cores: set[int]):
        self.plan, self.job, self.cores = plan, job, cores
        self.process: Process | None = None
        self.started = time.monotonic()
        if _locked(job.directory):
            console.say(f"{job.directory}: a process of an earlier study is at work here; waiting for it")

    def ended(self, stopping: bool) -> bool:
        """Begins the process when the directory is free, and looks whether it has ended."""
        if self.process is not None:
            return self.process.ended()
        if stopping:
            return True
        if not _locked(self.job.directory):
            self.job.directory.parent.mkdir(parents=True, exist_ok=True)
            file, log = (beside(self.job.directory, suffix) for suffix in ("yaml", "log"))
            file.write_text(to_yaml(self.job.config), encoding="utf-8")
            self.plan.begin(self.job)
            self.started = time.monotonic()
            self.process = Process(file, log, self.cores)
        return False


class _Work:
    """The runs under way, and those that failed."""

    def __init__(self, plan: Plan, stopper: console.Stopper, bar: console.Bar, done: int):
        self.plan, self.stopper, self.bar, self.done = plan, stopper, bar, done
        self.failures: list[Failure] = []
        self._shares = _shares(plan.study.jobs)
        self._running: dict[int, _Running] = {}
        self._told = False
        self._more = True  # there may be a run that can be begun

    def goes_on(self) -> bool:
        """Begins runs where there is room, or asks them to end; False when none is under way."""
        if self.stopper.signal is None and self._more:
            failed = {failure.job.directory for failure in self.failures}
            for slot in set(range(self.plan.study.jobs)) - self._running.keys():
                busy = {one.job.directory for one in self._running.values()}
                if (job := self.plan.next(busy, failed)) is None:
                    self._more = False
                    break
                self._running[slot] = _Running(self.plan, job, self._shares[slot])
        elif self.stopper.signal is not None and not self._told:
            self._told = True
            self.end()
        return bool(self._running)

    def look(self) -> None:
        """Records the runs that have ended."""
        stopping = self.stopper.signal is not None
        for slot, one in list(self._running.items()):
            if not one.ended(stopping):
                continue
            del self._running[slot]
            self._more = True
            failure = _ended(self.plan, one) if one.process is not None else None
            if stopping:
                continue  # that it did not finish is no failure
            self.failures += [failure] if failure else []
            self.done += not failure
            total = len(self.plan.jobs(all_of_them=True))
            self.bar.advance(one.job.title, by=int(not failure), total=total)
            console.say(f"{self.done}/{total}  {_line(self.plan, one, failure)}")

    def end(self, patience: float = 0) -> None:
        """Asks the processes under way to end, and kills those that have not after so many seconds, if any."""
        processes = [one.process for one in self._running.values() if one.process is not None]
        for process in processes:
            process.signal(signal.SIGTERM)
        until = time.monotonic() + patience
        while patience and (processes := [process for process in processes if not process.ended()]):
            if time.monotonic() > until:
                for process in processes:
                    process.signal(signal.SIGKILL)
            time.sleep(PAUSE)


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

ASSUMED = {"start": 300.0, "iteration": 14.0, "begin": 25.0}
"""seconds of a start, whose base model is to be trained, of an iteration, and of a run beside its iterations"""


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
