"""What the hosts of one run, a process each, say to each other, apart from arrays.

All functions but `watch`, `lost` and `stop` are called by all hosts, in the same order, from one thread. With one
process they are trivial and touch no device. A host that waits for others waits as long as they live: `watch` ends it
when one is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scir_jax.engine.hosts import coordination, liveness
from scir_jax.engine.hosts.coordination import Store
from scir_jax.errors import InputError, Interrupted

T = TypeVar("T")

ROUND = "scir/round"

# The first host writes a file whose name begins so: by it the others recognise the directory.
SEEN = ".seen-by-all-hosts-"
# That file must show up on another host within this time.
FILE_SECONDS = 5.0
# Without a watch, an orderly end waits this long for the others.
PATIENCE_SECONDS = 60.0
# A first host that fails stays this long, so that the others hear why before JAX ends them.
FAILED_SECONDS = 10.0

# What JAX's runtimes say when a collective or the coordinator loses another host.
LOSSES = (
    "gloo",
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "socket closed",
    "broken pipe",
    "coordination service",
    "coordinationservice",
    "coordination_service",
    "heartbeat",
    "task disconnected",
    "unavailable:",
    "remote process exited",
    "ncclremoteerror",
    "data transfer program terminated",
)


@dataclasses.dataclass
class _Cluster:
    """The process's place among the hosts."""

    store: Store | None = None
    names: Sequence[str] = ()
    rounds: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    watch: liveness.Watch | None = None


_cluster = _Cluster()


def start(distributed: bool, wait: float = 300) -> None:
    """Joins the hosts of a run when asked for; must come before any computation of JAX.

    The cluster is JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where they are set, else what JAX
    finds by itself: a TPU slice, Slurm, Open MPI, Kubernetes.

    Args:
      wait: seconds until all hosts must be there.

    Raises:
      InputError: no cluster, a variable that is missing or not what it should be, a coordinator that cannot be reached
        or hosts that did not come in time.
    """
    if not distributed:
        return
    _cluster.store = coordination.connect(wait)
    if count() > 1:
        liveness.catch_abort(_cluster.store, [f"at {_cluster.store.address}"])
        _cluster.names = gather(socket.gethostname())
        liveness.catch_abort(_cluster.store, _cluster.names)


def count() -> int:
    """Returns the number of hosts."""
    return _cluster.store.count if _cluster.store else 1


def index() -> int:
    """Returns this host's place, 0 for the first.

    Arrays are placed by jax.process_index(), which may count otherwise.
    """
    return _cluster.store.index if _cluster.store else 0


def first() -> bool:
    """Checks whether this is the first host."""
    return index() == 0


def name(host: int) -> str:
    """Returns a host's name as a person reads it, "host 1 (NAME)"."""
    return f"host {host} ({_cluster.names[host] if _cluster.names else socket.gethostname()})"


def gather(value: Any) -> list:
    """Gives a JSON value of every host, in order of index, to all hosts."""
    return _exchange("gather", value)


def barrier(name: str) -> None:
    """Waits until all hosts are there.

    Raises:
      RuntimeError: hosts are at barriers of other names.
    """
    _exchange(f"barrier {name!r}", None)


def decide(fn: Callable[[], T]) -> T:
    """Runs fn on the first host only; all hosts return its JSON result or raise its InputError."""
    value = error = None
    if first():
        try:
            value = fn()
        except InputError as raised:
            if count() == 1:
                raise
            error = str(raised)
    value, error = _exchange("decide", [value, error])[0]
    if error is not None:
        raise _agreed(error)
    return value


def together(fn: Callable[[], T]) -> T:
    """Runs fn on every host, where its result stays; all hosts raise InputError if one does.

    The message is that of the lowest index, with 'host 1: ' before it on the other hosts unless all say the same. Other
    exceptions propagate on their host only.
    """
    value = error = None
    try:
        value = fn()
    except InputError as raised:
        if count() == 1:
            raise
        error = str(raised)
    errors = _exchange("together", error)
    for host, message in enumerate(errors):
        if message is not None:
            same = host == index() or all(other == message for other in errors)
            raise _agreed(message if same else f"host {host}: {message}")
    return value


def same(value: dict, what: str) -> None:
    """Checks that a nested mapping of JSON values is the same on all hosts.

    Raises:
      InputError: on all hosts, with the first differing keys: "host 1 has optimise.batch_size 8, host 0 has 16: start
        all hosts with the same WHAT".
    """
    values = [dict(_leaves(value)) for value in _exchange("same", value)]
    for host, theirs in enumerate(values):
        keys = [key for key in values[0] | theirs if values[0].get(key, _NOTHING) != theirs.get(key, _NOTHING)]
        if keys:
            some, more = keys[:3], f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            has = ", ".join(f"{key} {_shown(theirs, key)}" for key in some)
            first_has = ", ".join(_shown(values[0], key) for key in some)
            raise _agreed(f"host {host} has {has}{more}, host 0 has {first_has}: start all hosts with the same {what}")


_NOTHING = object()


def _shown(values: dict, key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "none"


def _leaves(value: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def shares(directory: Path) -> None:
    """Checks that all hosts see the same directory, which is made where it is missing.

    Raises:
      InputError: on all hosts, where the file that the first host writes does not show up on another.
    """
    if count() == 1:
        return
    directory = Path(directory)
    token = directory / f"{SEEN}{gather(secrets.token_hex(8))[0]}"

    def write():
        if first():
            try:
                directory.mkdir(parents=True, exist_ok=True)
                # A process that was killed while others looked left these.
                for old in directory.glob(f"{SEEN}*"):
                    old.unlink(missing_ok=True)
                token.touch()
            except OSError as error:
                raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from None

    def look():
        end = time.monotonic() + FILE_SECONDS
        while not token.exists():
            if time.monotonic() > end:
                raise InputError(
                    f"{directory} is not the directory of that name on {name(0)}: "
                    "give one on a file system that all hosts share"
                )
            time.sleep(0.1)

    try:
        together(write)
        together(look)
    finally:
        if first():
            with contextlib.suppress(OSError):
                token.unlink()


class Votes:
    """Whether any host raised its flag, asked in every step of a loop without waiting for the devices.

    With several processes `cast` sends the flag and returns the answer of the previous call, False in the first; all
    hosts get the same answers at the same calls. Each call is one small program on the devices, which is read one
    call later: then the program before it is done, and the next is already waiting. With one process `cast` returns
    its flag at once.
    """

    def __init__(self):
        self._answer: jax.Array | None = None
        if count() == 1:
            return
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        split = NamedSharding(mesh, PartitionSpec("devices"))
        self._flags = [
            jax.make_array_from_callback(mesh.devices.shape, split, lambda _, flag=flag: np.full(1, flag, np.int32))
            for flag in (0, 1)
        ]
        self._any = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, flag: bool) -> bool:
        """Gives this host's flag and returns an answer, as the class says."""
        if count() == 1:
            return bool(flag)
        before, self._answer = self._answer, self._any(self._flags[bool(flag)])
        return _read(before)

    def settle(self) -> bool:
        """Waits for the answer of the last call and returns it; False where there is none, or it was settled before."""
        before, self._answer = self._answer, None
        return _read(before)


def _read(answer: jax.Array | None) -> bool:
    return answer is not None and bool(np.asarray(answer.addressable_data(0)))


def vote(flag: bool) -> bool:
    """Asks whether any host's flag is True; waits for all hosts but for no device."""
    return any(gather(bool(flag)))


def watch(timeout: float = 60, interval: float | None = None) -> None:
    """Starts to watch over the other hosts, until `finish`.

    Where one was silent for `timeout` seconds, or said that it stops for an error of its own, this process ends with
    exit code 4 and one sentence on stderr, whatever it is doing.

    Args:
      timeout: seconds of silence.
      interval: seconds between two signs of life; a twelfth of the timeout, at most 3, by default.
    """
    if count() > 1 and _cluster.watch is None:
        interval = min(3.0, timeout / 12) if interval is None else interval
        _cluster.watch = liveness.Watch(_cluster.store, _cluster.names, timeout, interval)
        _cluster.watch.start()


def lost(error: BaseException) -> bool:
    """Checks whether an exception means that another host is gone; if so, hand it to `stop`."""
    if count() == 1:
        return False
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error).lower()
        if isinstance(error, jax.errors.JaxRuntimeError) and any(loss in text for loss in LOSSES):
            return True
        error = error.__cause__ or error.__context__
    return False


def stop(error: BaseException) -> NoReturn:
    """Ends the process as the watch does, for an exception that is `lost`; names the host that is gone if it can."""
    why = _cluster.watch.find_lost() if _cluster.watch else None
    text = str(error).strip().split("\n")[0]
    liveness.end(why or f"another host is gone ({text})", _cluster.watch)


def finish(error: BaseException | None = None) -> None:
    """Leaves the other hosts in order, before the process ends; nothing of this module may be called after it.

    Without an error, or with one that all hosts have (an Interrupted, an InputError of `decide`, `together`, `same` or
    `shares`), the first host waits for the others as long as they live, and nobody else waits. With an error of this
    host alone the others are told, and end with exit code 4. Checkpoints must be written before.
    """
    store, guard = _cluster.store, _cluster.watch
    _cluster.store = _cluster.watch = None
    if store is None:
        return
    if store.count == 1:
        store.close()
        return
    ordered = error is None or isinstance(error, Interrupted) or getattr(error, "agreed", False)
    why = None if error is None else " ".join(f"{_kind(error)}{error}".split())[:500]
    if guard:
        # If others now end because of this host, that is no reason for it to end.
        guard.leaving = True
        if not ordered:
            guard.stop()
    try:
        liveness.say_farewell(store, liveness.Farewell(why, ordered))
        if store.index == 0:
            end = time.monotonic() + (PATIENCE_SECONDS if ordered else FAILED_SECONDS)
            while not liveness.others_left(store) and ((ordered and guard) or time.monotonic() < end):
                time.sleep(0.05)
            # They said that they leave; JAX aborts one that has not when its coordinator is gone.
            liveness.within(liveness.GRACE_SECONDS, store.wait_for_the_others_to_leave)
    except jax.errors.JaxRuntimeError as failure:
        liveness.end(f"another host is gone ({str(failure).strip().splitlines()[0]})", guard)
    if guard:
        guard.stop()
    store.close()
    liveness.leave_abort()


def _kind(error: BaseException) -> str:
    return "" if isinstance(error, InputError) else f"{type(error).__name__}: " if str(error) else type(error).__name__


def _agreed(message: str) -> InputError:
    """Makes an InputError that all hosts raise."""
    error = InputError(message)
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _exchange(kind: str, value: Any) -> list:
    """Exchanges JSON values of all hosts, in order of index, through the first host: two messages per host."""
    text = json.dumps([kind, value])
    if count() == 1:
        return [json.loads(text)[1]]
    store, number = _cluster.store, next(_cluster.rounds)
    directory = f"{ROUND}/{number}"
    if first():
        texts = [text, *(store.get(f"{directory}/{host}") for host in range(1, count()))]
        if number:
            # All are in this round, so they have read the last.
            store.delete(f"{ROUND}/{number - 1}")
        store.put(f"{directory}/all", json.dumps(texts))
    else:
        store.put(f"{directory}/{index()}", text)
        texts = json.loads(store.get(f"{directory}/all"))
    kinds, values = zip(*map(json.loads, texts))
    if len(set(kinds)) > 1:
        places = ", ".join(f"host {host} at {kind}" for host, kind in enumerate(kinds))
        raise RuntimeError(f"the hosts are at different places of the program: {places}")
    return list(values)
