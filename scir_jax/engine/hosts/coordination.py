"""The coordination service of jax.distributed: coming together, a store of texts, leaving.

The only module that uses a private interface of JAX: the client of the service, whose store Orbax uses too. Texts go
through the store and not through collectives of arrays, because it needs no device, has timeouts and can be
interrupted.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from typing import Any

import jax
from jax._src import distributed

from scir_jax.errors import InputError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# Signals are only seen between two calls of the client.
SLICE_MS = 1000
# The watch finds a lost host long before JAX does; where JAX finds one itself it ends the process.
JAX_HEARTBEAT_SECONDS = 3600


def arguments() -> dict[str, Any]:
    """Reads what the environment says of the cluster.

    Returns:
      Arguments of jax.distributed.initialize; none where the environment says nothing.

    Raises:
      InputError: a variable is missing beside the others, or is not what it should be.
    """
    given = {name: os.environ[name].strip() for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name, "").strip()}
    result: dict[str, Any] = {}
    if ADDRESS in given:
        host, _, port = given[ADDRESS].rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(f"{ADDRESS}={given[ADDRESS]}: expected HOST:PORT of the first host")
        result["coordinator_address"] = given[ADDRESS]
    for name, key, least in ((COUNT, "num_processes", 1), (INDEX, "process_id", 0)):
        if name in given:
            if not given[name].isdecimal() or int(given[name]) < least:
                raise InputError(f"{name}={given[name]}: expected a whole number from {least}")
            result[key] = int(given[name])
    if COUNT in given or INDEX in given:
        missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
        if missing:
            raise InputError(f"{' and '.join(missing)} must be set beside {' and '.join(given)}, on every host")
        if result["process_id"] >= result["num_processes"]:
            raise InputError(f"{INDEX}={result['process_id']}: must be below {COUNT}={result['num_processes']}")
    return result


def connect(wait: float) -> Store:
    """Joins the cluster that the environment names, or that JAX finds (TPU slices, Slurm, Open MPI, Kubernetes).

    Must come before any computation of JAX. Returns when all hosts are there.

    Raises:
      InputError: no cluster is found, its coordinator cannot be reached or not all hosts came within `wait` seconds.
    """
    given = arguments()
    if given.get("process_id") == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_port(given["coordinator_address"])
    # JAX's handler of SIGTERM would replace that of a run, which stops all hosts at one step by itself.
    jax.config.update("jax_enable_preemption_service", False)
    failed: list[Exception] = []

    def initialize():
        try:
            # A shutdown time of 0: no host waits for the others when it leaves.
            jax.distributed.initialize(
                **given,
                initialization_timeout=int(wait) + 3600,
                heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=0,
            )
        except Exception as error:
            failed.append(error)

    # JAX ends the process where it waits too long, and hears no signal while it waits.
    thread = threading.Thread(target=initialize, name="connect", daemon=True)
    thread.start()
    end = time.monotonic() + wait
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.2)
    if thread.is_alive():
        message = _nobody(given, wait)
    elif not failed:
        state = distributed.global_state
        return Store(state.client, state.coordinator_address, state.num_processes, state.process_id)
    else:
        message = _not_initialised(failed[0], given)
    _forget()
    raise InputError(message)


def _check_port(address: str) -> None:
    """Checks that the coordinator's port is free.

    The service may crash where it finds its port taken, and shares it with another service that is still there.
    """
    port = int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise InputError(
            f"the coordinator cannot listen on port {port} of this host, the first ({os.strerror(error.errno or 0)}): "
            f"end what uses it, or set another in {ADDRESS} on all hosts"
        ) from None


def _nobody(given: dict, wait: float) -> str:
    state = distributed.global_state
    address = state.coordinator_address or given.get("coordinator_address")
    if address is None:
        return f"no cluster was found within {wait:g} s: {_how()}"
    if state.service is None and not reachable(address):
        return (
            f"the coordinator at {address} could not be reached for {wait:g} s: "
            "start the same command on the first host too, and open its port to the others"
        )
    number = given.get("num_processes", state.num_processes)
    return (
        f"not all {number if number > 1 else ''} hosts came to the coordinator at {address} within {wait:g} s: "
        "start the same command on every host, each with an index of its own"
    ).replace("  ", " ")


def _not_initialised(error: Exception, given: dict) -> str:
    if isinstance(error, RuntimeError) and "must be called before" in str(error):
        raise error
    text = " ".join(str(error).split())
    if "Failed to start RPC server" in text:
        address = distributed.global_state.coordinator_address
        return f"the coordinator cannot listen at {address} on this host, the first: end what uses the port"
    if "coordinator_address" in given:
        return f"the cluster cannot be used: {text or type(error).__name__}: {_how()}"
    return f"no cluster was found ({text or type(error).__name__}): {_how()}"


def _how() -> str:
    return f"set {ADDRESS}, {COUNT} and {INDEX} on every host, or leave --distributed out on a single one"


def reachable(address: str) -> bool:
    """Checks whether something listens at an address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        return True
    except OSError:
        return False


def _forget() -> None:
    """Leaves a cluster that has not come together to the end of the process.

    Destroying its objects waits for it and logs errors; JAX's own end would be an abort.
    """
    state = distributed.global_state
    for thing in (state.client, state.service):
        if thing is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    state.client = state.service = None


class Store:
    """Texts under keys that all hosts see; each key is written once unless said otherwise.

    Calls raise jax.errors.JaxRuntimeError where the coordinator cannot be reached.
    """

    def __init__(self, client, address: str, count: int, index: int):
        self._client = client
        self.address, self.count, self.index = address, count, index

    def put(self, key: str, text: str, overwrite: bool = False) -> None:
        """Writes a text under a key."""
        self._client.key_value_set(key, text, allow_overwrite=overwrite)

    def get(self, key: str) -> str:
        """Reads the text of a key, for which it waits without a limit."""
        while True:
            try:
                return self._client.blocking_key_value_get(key, SLICE_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def entries(self, directory: str) -> dict[str, str]:
        """Returns the texts under DIRECTORY/NAME by name, without waiting."""
        return {key.rpartition("/")[2]: text for key, text in self._client.key_value_dir_get(f"{directory}/")}

    def delete(self, directory: str) -> None:
        """Deletes all keys under a directory."""
        self._client.key_value_delete(f"{directory}/")

    def wait_for_the_others_to_leave(self) -> None:
        """Waits until no other host is connected."""
        self._client.get_live_nodes(list(range(self.count)))

    def close(self) -> None:
        """Leaves without waiting; the first host takes the service with it."""
        jax.distributed.shutdown()
