"""TPU slices by name, described by libtpu without a TPU: devices to compile for ahead of time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from scir_jax.engine.cost.chips import CHIPS, Chip
from scir_jax.errors import InputError

Shape = tuple[int, ...]

# Slices that Cloud TPU offers ("supported configurations" of each generation's page), in chips.
_FLAT: tuple[Shape, ...] = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES: tuple[Shape, ...] = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 12), (8, 8, 16), (8, 16, 16), (16, 16, 16)),
)
SHAPES: dict[str, tuple[Shape, ...]] = {
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": (*_CUBES, (16, 16, 24)),
    "v6e": _FLAT,
    "tpu7x": ((1, 1, 1), *_CUBES, (16, 16, 24), (16, 16, 36)),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7": "tpu7x", "v7x": "tpu7x", "trillium": "v6e", "ironwood": "tpu7x"}
# A slice's other name counts TensorCores: two per chip in these generations.
_CORES = {"v4": 2, "v5p": 2, "tpu7x": 2}
# Without these libtpu would look for a TPU machine, complain on any other, and write log files. Its lock is one for
# hardware, which nothing here touches.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice.

    Attributes:
      name: generation and shape, "v5e:4x4".
      devices: to compile for, not to run on; each chip has chip.devices of them.
      hosts: machines.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    hosts: int

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.devices


def topology(name: str) -> Topology:
    """Finds the slice of a name.

    A name is a generation and a shape in chips ("v5e:4x4", "v5p:2x2x4"), or what slices are called when they are
    created ("v5litepod-16", "v6e-8", "v5p-32", whose number counts TensorCores where a chip has two).

    Loads libtpu, whose noise on stderr it avoids. JAX's backends are not initialised and no device is touched; to
    compile for the slice JAX needs some backend all the same, for which a CPU will do (JAX_PLATFORMS=cpu).

    Raises:
      InputError: no such generation or slice, or libtpu is not installed or refuses it.
    """
    generation, shape = parse(name)
    if not _installed():
        raise InputError(
            "--topology: libtpu, the TPU compiler, is not installed; pip install 'scir_jax[tpu]' (no TPU is needed), "
            "or leave --topology out to plan for the devices that are here"
        )
    full = f"{generation}:{'x'.join(map(str, shape))}"
    host = _host(shape)
    options: dict[str, Any] = {"chips_per_host_bounds": [*host, *[1] * (3 - len(host))]}
    if generation == "v4":
        # As on the real machines, the two cores of a chip are one device.
        options["chip_config_name"] = "megacore"
    try:
        with _environment():
            devices = topologies.get_topology_desc(platform="tpu", topology_name=full, **options).devices
    except RuntimeError as error:
        raise InputError(f"--topology {name}: libtpu refuses it ({' '.join(str(error).split())[:200]})") from None
    return Topology(full, CHIPS[generation], tuple(devices), math.prod(shape) // math.prod(host))


def parse(name: str) -> tuple[str, Shape]:
    """Reads the generation and the shape in chips from a slice's name; see `topology`.

    Raises:
      InputError: there is no such slice.
    """
    match = re.fullmatch(r"(\w+)[:-](\d+(?:x\d+)*)", name.strip().lower())
    generation = _ALIASES.get(match[1], match[1]) if match else ""
    if generation not in SHAPES:
        raise InputError(
            f"--topology {name}: no such TPU; generations are {', '.join(SHAPES)}, a slice is named like v5e:4x4, "
            "v5p:2x2x4 or v5litepod-16"
        )
    numbers = tuple(map(int, match[2].split("x")))
    if len(numbers) > 1:
        shape = next((known for known in SHAPES[generation] if sorted(known) == sorted(numbers)), None)
        if shape is None and _whole_cubes(generation, numbers):
            shape = tuple(sorted(numbers))
    else:
        chips = numbers[0] / _CORES.get(generation, 1)
        shape = next((known for known in SHAPES[generation] if math.prod(known) == chips), None)
    if shape is None:
        raise InputError(f"--topology {name}: no such slice; {generation} has {_listed(generation)}")
    return generation, shape


def _whole_cubes(generation: str, shape: Shape) -> bool:
    """Checks whether a slice is made of cubes, as larger ones of the three-dimensional generations are.

    They may have any shape that cubes of 4 x 4 x 4 chips make.
    """
    largest = math.prod(SHAPES[generation][-1])
    return (
        len(SHAPES[generation][-1]) == len(shape) == 3
        and not any(n % 4 or not n for n in shape)
        and (math.prod(shape) <= largest)
    )


def _listed(generation: str) -> str:
    shapes, cores = SHAPES[generation], _CORES.get(generation, 1)
    names = ", ".join(
        f"{generation}:{'x'.join(map(str, shape))} ({generation}-{math.prod(shape) * cores})" for shape in shapes
    )
    if len(shapes[-1]) == 3:
        names += f", and AxBxC of multiples of 4 up to {math.prod(shapes[-1])} chips"
    return names


def _host(shape: Shape) -> Shape:
    """Returns the chips of one machine: a flat slice of up to eight has one, all others machines of four."""
    if math.prod(shape) == 1 or shape == (2, 4):
        return shape
    return (2, 2)


def _installed() -> bool:
    path = os.environ.get("TPU_LIBRARY_PATH")
    return bool(path and Path(path).is_file()) or importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets libtpu's settings while it is loaded; those that are set already stay."""
    added = {key: value for key, value in _ENVIRONMENT.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
