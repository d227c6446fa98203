"""Whether the other hosts are still there, and the end of this one where they are not.

A collective on a device waits without limit for a host that is gone and cannot be interrupted, so a thread ends the
process. All such ends have exit code 4 and one sentence as the last line on stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import jax

from scir_jax.engine.hosts.coordination import Store

EXIT_CODE = 4
PULSE, LEFT = "scir/pulse", "scir/left"

# A host that fails by itself, too, has this long to say so in its own words.
GRACE_SECONDS = 2.0
# The client holds a lock while it aborts, so that a call in another thread is not answered.
ANSWER_SECONDS = 2.0

LOST_SERVICE = "the coordinator, this host, cannot go on for the reason above"

_ending = threading.Lock()
_groups: set[int] = set()


class Watch:
    """Hears all hosts, and ends this one where another is lost.

    Args:
      names: host names by index.
      timeout: seconds of silence after which a host is lost.
      interval: seconds between two signs of life.
    """

    def __init__(self, store: Store, names: Sequence[str], timeout: float, interval: float):
        self.store, self.names, self.timeout, self.interval = store, names, timeout, interval
        now = time.monotonic()
        self._answered = now
        self._heard = [now] * store.count
        self._beats: list[str | None] = [None] * store.count
        self._left: dict[int, Farewell] = {}
        # Set by a host that is on its way out with the others.
        self.leaving = False
        self._round = threading.Condition()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=run.__name__, daemon=True) for run in (self._pulse, self._judge)
        ]

    def start(self) -> None:
        """Starts the threads that give signs of life and hear the others'."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stops these threads and waits for them."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self.interval + 1)

    def _pulse(self) -> None:
        """Gives a sign of life and hears the others'. A call of a coordinator that hangs may never return."""
        beat = 0
        while not self._stop.is_set():
            beat += 1
            try:
                self.store.put(f"{PULSE}/{self.store.index}", str(beat), overwrite=True)
                beats, left = self.store.entries(PULSE), farewells(self.store)
            except jax.errors.JaxRuntimeError:
                self._stop.wait(self.interval)
                continue
            with self._round:
                now = self._answered = time.monotonic()
                self._left = left
                for index, text in beats.items():
                    if text != self._beats[int(index)]:
                        self._beats[int(index)], self._heard[int(index)] = text, now
                self._round.notify_all()
            self._stop.wait(self.interval)

    def _judge(self) -> None:
        step = min(1.0, self.interval, self.timeout / 10)
        before = nobody_left = time.monotonic()
        while not self._stop.wait(step):
            now = time.monotonic()
            pause, before = now - before - step, now
            if pause > step:
                self.stood_still(pause)
            why, grace = self.departure()
            if not why:
                nobody_left = now
            elif now - nobody_left < grace:
                why = None
            why = why or self.silence(self.timeout)
            if why:
                end(why, self)

    def stood_still(self, seconds: float) -> None:
        """Takes note that this host itself was stopped for some seconds and could not hear anybody."""
        with self._round:
            self._answered += seconds
            self._heard = [heard + seconds for heard in self._heard]

    def host(self, index: int) -> str:
        """Returns a host's name as a person reads it, "host 1 (NAME)"."""
        return f"host {index} ({self.names[index]})"

    def departure(self) -> tuple[str | None, float]:
        """Finds another host that said that it stops for a reason.

        Returns:
          A sentence or None, and the seconds that this host has to stop too.
        """
        with self._round:
            left = dict(self._left)
        # A host that failed comes before one that leaves in order.
        for index, farewell in sorted(left.items(), key=lambda item: (item[1].ordered, item[0])):
            if farewell.why is not None and index != self.store.index and not (farewell.ordered and self.leaving):
                if farewell.followed:
                    return farewell.why, GRACE_SECONDS
                grace = self.timeout if farewell.ordered else GRACE_SECONDS
                return f"{self.host(index)} stopped: {farewell.why}", grace
        return None, 0.0

    def silence(self, seconds: float) -> str | None:
        """Finds other hosts that were silent for these seconds.

        Returns:
          A sentence or None.
        """
        with self._round:
            if time.monotonic() - self._answered >= seconds:
                return f"the coordinator, {self.host(0)}, has not answered for {seconds:g} s"
            silent = sorted(self._silent(seconds) - self._left.keys() - {self.store.index})
        if not silent:
            return None
        who = " and ".join(map(self.host, silent[:3])) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        return f"{who} {'has' if len(silent) == 1 else 'have'} not been heard of for {seconds:g} s"

    def find_lost(self) -> str | None:
        """Finds the host that is lost, in up to three intervals.

        Returns:
          A sentence, or None where no host is known to be lost.
        """
        enough = min(2.5 * self.interval, self.timeout)
        until = time.monotonic() + 3 * self.interval + 1
        while time.monotonic() < until:
            why = self.departure()[0] or self.silence(enough)
            if why:
                return why
            with self._round:
                self._round.wait(self.interval / 5)
        return None

    def gone(self) -> set[int]:
        """Returns the hosts that left or were silent for a few intervals."""
        left = farewells(self.store).keys()
        with self._round:
            return self._silent(min(self.timeout, 3 * self.interval)) | left

    def _silent(self, seconds: float) -> set[int]:
        # Silence counts up to the last answer: after it nobody could be heard.
        return {index for index, heard in enumerate(self._heard) if self._answered - heard >= seconds}


class Farewell(NamedTuple):
    """Why a host left.

    Attributes:
      why: None at the end of its work.
      ordered: the others leave at the same place.
      followed: it left because of another host, which `why` names.
    """

    why: str | None
    ordered: bool = False
    followed: bool = False


def farewells(store: Store) -> dict[int, Farewell]:
    """Returns the farewells of all hosts that left, by index."""
    return {int(index): Farewell(*json.loads(text)) for index, text in store.entries(LEFT).items()}


def say_farewell(store: Store, farewell: Farewell) -> None:
    """Tells the other hosts why this one leaves."""
    store.put(f"{LEFT}/{store.index}", json.dumps(farewell), overwrite=True)


def others_left(store: Store) -> bool:
    """Checks whether all other hosts said farewell."""
    return len(farewells(store).keys() - {store.index}) == store.count - 1


def end(why: str, watch: Watch | None = None) -> NoReturn:
    """Ends the process with exit code 4 and one sentence on stderr.

    With a watch the other hosts are told. The first host goes last where they still live, because JAX aborts them
    when it is gone.
    """
    # The lock is never released: the first reason is printed, once.
    _ending.acquire()
    if watch is not None:
        within(watch.interval + GRACE_SECONDS + 1 if watch.store.index == 0 else 1, lambda: _tell(watch, why))
    within(1, sys.stdout.flush)
    within(1, sys.stderr.flush)
    # A progress bar leaves the cursor in its line.
    line = "\n" if sys.stderr.isatty() else ""
    for group in _groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os.write(2, f"{line}error: {why}; this host stops; start the same command on all hosts again to go on\n".encode())
    os._exit(EXIT_CODE)


@contextlib.contextmanager
def ends_with_us(group: int) -> Iterator[None]:
    """Lets a process group that this process started be killed where `end` ends this process within the block."""
    _groups.add(group)
    try:
        yield
    finally:
        _groups.discard(group)


def _tell(watch: Watch, why: str) -> None:
    say_farewell(watch.store, Farewell(why, followed=True))
    while watch.store.index == 0 and len(watch.gone() | {0}) < watch.store.count:
        time.sleep(0.05)


def within(seconds: float, run: Callable[[], object]) -> bool:
    """Runs a function in a thread, since it may hang.

    Returns:
      Whether it ran to its end in time and without an error.
    """
    ended, done = threading.Event(), []

    def call():
        with contextlib.suppress(Exception):
            run()
            done.append(True)
        ended.set()

    threading.Thread(target=call, daemon=True).start()
    ended.wait(seconds)
    return bool(done)


_handlers: list[object] = []


def catch_abort(store: Store, names: Sequence[str]) -> None:
    """Ends the process as `end` does where JAX would abort it because its connection to the coordinator broke.

    Other aborts go on. The handler is C's, since Python's would run only after abort() had come back. It runs in the
    thread of JAX that aborts, between two of its calls, so that Python may run in it.
    """

    def aborted(_):
        if not within(ANSWER_SECONDS, lambda: store.entries(PULSE)):
            end(f"the connection to the coordinator, host 0 ({names[0]}), is lost" if store.index else LOST_SERVICE)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _handlers.append(handler)
    _set_handler(ctypes.cast(handler, ctypes.c_void_p))


def leave_abort() -> None:
    """Gives all aborts their ordinary end back."""
    _set_handler(ctypes.c_void_p(0))


def _set_handler(pointer: ctypes.c_void_p) -> None:
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, pointer)
