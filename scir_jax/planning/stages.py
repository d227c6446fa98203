"""A run's programs, each compiled ahead of time for the mesh: memory, FLOPs, communication, and the least time."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable

import jax

from scir_jax.engine import flops, memory
from scir_jax.engine.chips import Chip
from scir_jax.engine.flops import Flops
from scir_jax.engine.memory import Memory
from scir_jax.engine.mesh import batch_shards
from scir_jax.loop.programs import Program, compile_program, programs
from scir_jax.model.attention import backend_of
from scir_jax.planning.collectives import Collective, collectives
from scir_jax.planning.limits import Planned

SKIPPED = "not compiled, since another one does not fit"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program on a mesh.

    Attributes:
      memory: bytes a device; without what the compiler would add where `reason` says why there is no program.
      flops: of one call, over all devices.
      streamed: bytes that each device reads from its memory in one call at the least; counted for samplers only.
      collectives: of one device in one call.
      seconds: that compilation took.
      reason: why there is no program, or None; SKIPPED where it may fit all the same.
    """

    name: str
    memory: Memory
    limit: int
    flops: Flops
    streamed: int = 0
    collectives: tuple[Collective, ...] = ()
    seconds: float = 0.0
    reason: str | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None and self.memory.total <= self.limit

    def least(self, chip: Chip, devices: int) -> dict[str, float]:
        """Seconds of one call at the least, by what bounds it: every FLOP at the peak, every byte at full bandwidth."""
        return {
            "arithmetic": self.flops.hardware / devices / chip.flops,
            "memory": self.streamed / chip.bandwidth,
            "links": sum(c.received for c in self.collectives) / chip.interconnect,
        }


def survey(run: Planned, limit: int, advance: Callable[[str], None], only: Callable[[str], bool] | None = None):
    """Compiles a run's programs, unless the weights of one alone do not fit.

    Args:
      limit: bytes that a program may use on a device.
      advance: is told each program's name before it is compiled.
      only: says of a name whether its program is wanted.

    Returns:
      [Stage].
    """
    found = [program for program in programs(run) if only is None or only(program.name)]
    # A run needs all of them: where one is too large for certain, the others need not be compiled to know it.
    hopeless = any(program.known.total > limit for program in found)
    stages = []
    for program in found:
        advance(program.name)
        stages.append(_stage(run, program, limit, run.flops[program.name], hopeless))
    return stages


def _stage(run: Planned, program: Program, limit: int, count: Flops, hopeless: bool) -> Stage:
    stage = Stage(program.name, program.known, limit, count, _streamed(run, program))
    if program.known.total > limit:
        return dataclasses.replace(stage, reason="too large before a single activation; not compiled")
    if hopeless:
        return dataclasses.replace(stage, reason=SKIPPED)
    started = time.monotonic()
    try:
        compiled = compile_program(run, program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(stage, seconds=time.monotonic() - started, reason=_short(str(error)))
    return dataclasses.replace(
        stage,
        memory=memory.whole(program.known, compiled, backend_of(run.model.layout)),
        collectives=tuple(collectives(compiled.as_text())),
        seconds=time.monotonic() - started,
    )


def _short(error: str) -> str:
    """The compiler's refusal in a few words."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", error)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of", error)
    return f"the compiler finds no way: {found[1]} {found[2]}iB" if found else "the compiler finds no way"


def _streamed(run: Planned, program: Program) -> int:
    """Bytes that a device reads while it decodes: at every step its share of the weights, and of the cache so far."""
    match = re.match(r"sample (\d+) a prompt", program.name)
    if match is None:
        return 0
    shapes, rows = run.facts.shapes, run.config.sample.batch_size * int(match[1])
    itemsize = jax.numpy.dtype(run.config.model.dtype).itemsize
    step = flops.decode_bytes(
        run.arch,
        rows,
        shapes.prompt + shapes.response // 2,
        itemsize,
        lora=run.model.lora,
        fsdp=run.mesh.shape["fsdp"],
        tensor=run.mesh.shape["tensor"],
        batch_shards=batch_shards(run.mesh),
    )
    return step * shapes.response
