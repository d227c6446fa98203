"""Memory of a compiled program, and of the device it is to run on. All figures are bytes per device."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a program needs while it runs.

    Attributes:
      weights: parameters, trained and frozen.
      optimiser: its state.
      gradients: of the trained parameters, float32.
      cache: keys and values of a sampler.
      other: activations and whatever else the compiler asks for.
    """

    weights: int = 0
    optimiser: int = 0
    gradients: int = 0
    cache: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def device_bytes(tree: Any) -> int:
    """Counts the bytes on one device of abstract or real arrays under their shardings.

    Arrays without a sharding count whole.
    """

    def bytes_of(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(bytes_of, jax.tree.leaves(tree)))


def compiled_bytes(compiled: jax.stages.Compiled, backend: str = "cpu") -> int:
    """Counts the bytes of a compiled program's arguments, results and temporaries, a donated argument once.

    Args:
      backend: "cpu", "gpu" or "tpu", what it is compiled for.
    """
    found = compiled.memory_analysis()
    if backend == "tpu":
        # The TPU's compiler compares this with the chip's memory. Of temporaries it counts more than are there at once.
        return found.peak_memory_in_bytes
    whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return whole - found.alias_size_in_bytes


def whole(known: Memory, compiled: jax.stages.Compiled, backend: str) -> Memory:
    """Returns what a compiled program needs: what is known of it, and the rest."""
    return dataclasses.replace(known, other=max(compiled_bytes(compiled, backend) - known.total, 0))


def limit() -> int:
    """Returns the bytes that programs may use on each device.

    On accelerators they are those of the smallest device, on a CPU the machine's or its container's, divided over the
    devices.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in s for s in stats):
        return min(s["bytes_limit"] for s in stats)
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            available = min(available, int(text))
    return available // jax.local_device_count()


def peak() -> tuple[int, str]:
    """Returns the most memory that this process has had so far, bytes, and whose: "device" or "process".

    Of several local devices it is that of the fullest one. A backend that does not tell (a CPU) has the process's resident
    memory.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in s for s in stats):
        return max(s["peak_bytes_in_use"] for s in stats), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
