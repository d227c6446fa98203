"""How a command begins and ends: joining other hosts, one sentence for the user's mistakes, exit codes."""

from __future__ import annotations

import errno
import functools
import importlib.util
import logging
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

from scir_jax.bucket import outputs
from scir_jax.bucket.objects import refusal, shown
from scir_jax.config.files import to_dict
from scir_jax.config.schema import Config
from scir_jax.errors import DIVERGED, UNAVAILABLE, Diverged, InputError, Interrupted, Unavailable
from scir_jax.run import host_memory

GOOGLE = "0x1ae0"
"""vendor of TPUs on the PCI bus"""
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
DISK_AWAY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN)


def join(config: Config) -> None:
    """Joins the other hosts of `run.distributed`, where that is set, before anything is computed.

    Raises:
      InputError: they cannot be reached, or have another configuration.
    """
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import console

    hosts.start(config.run.distributed)
    hosts.watch(config.run.host_timeout)
    console.only_first_host_speaks()
    hosts.same(to_dict(config), "configuration")


def without_absent_tpu(pci: Path = Path("/sys/bus/pci/devices")) -> None:
    """Keeps JAX from looking for a TPU where libtpu is installed (for its compiler) and no such device is there.

    It would find none and print lines about accelerator types and worker hostnames. Call it before JAX is imported.
    What the user says in JAX_PLATFORMS stands; with a GPU's plugin beside libtpu nothing is changed.
    """
    if "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ or not importlib.util.find_spec("libtpu"):
        return
    if any(file.read_text().strip() == GOOGLE for file in pci.glob("*/vendor")):
        return
    plugins = importlib.util.find_spec("jax_plugins")
    if not any(pkgutil.iter_modules(plugins.submodule_search_locations if plugins else [])):
        os.environ["JAX_PLATFORMS"] = "cpu"


@functools.cache
def without_abandoned_saves() -> None:
    """Keeps TensorStore and asyncio from printing a traceback for each write of a save that Orbax has given up.

    Orbax closes its event loop when a part of a save is refused; the other parts end later and find it closed, and
    nobody asks how they ended. Once per process: a hook calls the one before it.
    """
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(met) -> None:
        if not (isinstance(met.exc_value, RuntimeError) and str(met.exc_value) == "Event loop is closed"):
            before(met)

    sys.unraisablehook = hook


def main(run: Callable[[], int | None]) -> None:
    """Runs a command: a mistake of the user's becomes one sentence on stderr and exit code 2.

    3 is the code of a disk that is full or fails, 5 of a run that diverged, 6 of a bucket that does not answer.

    Of several hosts all end when one does; 4 is the code of those that lost another one.
    """
    host_memory.keep()
    without_absent_tpu()
    without_abandoned_saves()
    reason: BaseException
    try:
        code = run() or 0
        outputs.upload()
        _leave(None)
        sys.exit(code)
    except InputError as error:
        reason, code, message = error, DIVERGED if isinstance(error, Diverged) else 2, f"error: {error}"
    except Interrupted as stop:
        reason, code, message = stop, 128 + stop.signal, str(stop)
    except KeyboardInterrupt as stop:
        reason, code, message = stop, 130, "stopped"
    except Exception as error:
        disk = _of_disk(error)
        away = str(error) if isinstance(error, Unavailable) else refusal(error)
        if not disk and not away:
            _leave(error)
            raise
        reason = error
        code, message = (3, f"error: {disk}") if disk else (UNAVAILABLE, f"error: {away}")
    print(shown(message), file=sys.stderr, flush=True)
    _leave(reason)
    sys.exit(code)


def _leave(error: BaseException | None) -> None:
    """Tells the other hosts of a run, if there are some, how this one ends."""
    if "scir_jax.engine.hosts.hosts" in sys.modules:  # else no run was begun, and JAX need not be imported for this
        from scir_jax.engine.hosts import hosts

        if error is not None and hosts.lost(error):
            hosts.stop(error)
        hosts.finish(error)


def _of_disk(error: Exception) -> str | None:
    """Says what a disk refused; None where the error is another one."""
    where = getattr(error, "filename", None)
    number = error.errno if isinstance(error, OSError) else None
    # Orbax and TensorStore wrap the operating system's error in their own.
    if number in DISK_FULL or "No space left" in str(error) or "File too large" in str(error):
        return (
            f"no space left to write{f' {where}' if where else ''}; what was saved before is intact: "
            "free some space and run the same command again"
        )
    said = next((os.strerror(one) for one in DISK_AWAY if number == one or os.strerror(one) in str(error)), None)
    if said is None:
        return None
    return (
        f"{where or 'a file'}: {said.lower()}; what was saved before is intact: mend the directory and run the same "
        "command again"
    )
