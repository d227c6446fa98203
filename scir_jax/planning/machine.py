"""The machine that a plan is for: a TPU slice by name, or the devices that are here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from scir_jax.config.checks import resolve
from scir_jax.config.schema import Config
from scir_jax.engine.cost import memory
from scir_jax.engine.cost.chips import Chip, of_device
from scir_jax.engine.mesh import make_mesh
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.model import families
from scir_jax.planning.architectures import architecture
from scir_jax.planning.limits import planned
from scir_jax.planning.topology import topology
from scir_jax.run.auto import Target


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
      chip: None where its figures are not known: nothing is said about time then.
      limit: bytes that a program may use on a device.
      hosts: None where their number is not known.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    limit: int
    hosts: int | None = None

    @property
    def chips(self) -> int:
        return len(self.devices) // (self.chip.devices if self.chip else 1)


def describe(name: str | None) -> Machine:
    """Describes the slice of a name, or what is here.

    Raises:
      InputError: there is no such slice, or no compiler for it.
    """
    if name is not None:
        found = topology(name)
        return Machine(found.name, found.devices, found.chip, found.chip.usable, found.hosts)
    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    return Machine(f"{len(devices)} x {kind}", devices, of_device(kind), memory.limit(), jax.process_count())


def proposed_for(machine: Machine) -> Target:
    """Returns what proposals of settings take the machine for."""
    backend = {"cuda": "gpu", "rocm": "gpu"}.get(machine.devices[0].platform, machine.devices[0].platform)
    return Target(backend, len(machine.devices), machine.limit)


def plan(config: Config, machine: Machine) -> Programs:
    """Makes the configuration's programs for the machine.

    Raises:
      InputError: they cannot be made.
    """
    config = resolve(config)
    if config.world.directory and not Path(config.model.path, "config.json").is_file():
        raise InputError(
            f"{config.model.path}: the embedded world is not there yet; python -m scir_jax.train makes it, "
            "or set model.path to the model to plan for and world.directory to null"
        )
    hf_config, where = architecture(config.model.path)
    arch = families.read(hf_config, where)
    return planned(config, arch, make_mesh(config.mesh, machine.devices))
