"""The largest batches that fit: found by compiling, not by a formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from scir_jax.config.schema import Config
from scir_jax.planning import machine
from scir_jax.planning.limits import reward_programs
from scir_jax.planning.machine import Machine
from scir_jax.planning.stages import Stage, survey
from scir_jax.run import console

MOST = 4096
SECANTS = 6
"""compilations after which the search halves its interval: memory was no line"""
KEYS = {
    "optimise.batch_size": ("optimise",),
    "sample.batch_size": ("prefill", "decode"),
    "evaluate.batch_size": ("score", "judge", "rate", "reward"),
}


class Largest(NamedTuple):
    """The largest batch that fits, of one key.

    Attributes:
      configured: the configured batch.
      largest: the largest that fits; 0: none.
      total: what the largest one needs, bytes per device.
      next: the smallest batch that was seen not to fit; 0 where the search ended at MOST.
    """

    key: str
    configured: int
    largest: int
    total: int
    next: int


def largest(config: Config, target: Machine) -> Iterator[Largest]:
    """Finds the largest batch of one key after the other, all else as configured."""
    for key, kinds in KEYS.items():
        section, field = key.split(".")
        configured = getattr(getattr(config, section), field)

        def need(size: int, section=section, field=field, kinds=kinds) -> list[Stage]:
            values = dataclasses.replace(getattr(config, section), **{field: size})
            run = machine.plan(dataclasses.replace(config, **{section: values}), target)
            with console.stage(f"{section}.{field} {size}", 1) as bar:
                wanted = lambda program: program.stage in kinds
                return survey(run, target.limit, bar.advance, wanted, more=reward_programs(run))

        unit = units(config, target, key)
        found, total, above = _search(need, configured, unit)
        yield Largest(key, configured, found, total, above)


def units(config: Config, target: Machine, key: str) -> int:
    """Returns what a batch must be a multiple of."""
    mesh = machine.make_mesh(config.mesh, target.devices)
    micro = config.training.accumulate if key.startswith("optimise.") else 1
    return mesh.shape["data"] * mesh.shape["fsdp"] * micro


def _search(need: Callable[[int], list[Stage]], configured: int, unit: int) -> tuple[int, int, int]:
    """Finds (largest batch that fits, its bytes, smallest that does not), in multiples of `unit`.

    Memory grows along a line, which two compilations give: each further one tries where it ends.
    """
    tried: dict[int, tuple[bool, int]] = {}

    def fits(size: int) -> bool:
        if size not in tried:
            stages = need(size)
            tried[size] = (all(s.fits for s in stages), max((s.memory.total for s in stages), default=0))
            limits.extend(s.limit for s in stages)
        return tried[size][0]

    limits: list[int] = []
    low, high = 0, MOST // unit * unit + unit
    guess = max(configured // unit * unit, unit)
    while high - low > unit:
        if fits(guess):
            low = guess
        else:
            high = guess
        known = sorted((size, total) for size, (fit, total) in tried.items() if fit)
        if len(tried) > SECANTS:
            guess = (low + high) // 2 // unit * unit
        elif len(known) > 1 and known[-1][1] > known[0][1]:
            (a, first), (b, last) = known[0], known[-1]
            end = b + (limits[0] - last) * (b - a) / (last - first)
            guess = int(end) // unit * unit
        else:
            guess = 2 * low if known else guess // 2 // unit * unit
        guess = min(max(guess, low + unit), high - unit)
    return low, tried[low][1] if low else 0, high if high in tried else 0
