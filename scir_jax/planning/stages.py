"""A run's programs, each compiled ahead of time for the mesh: memory, FLOPs, communication, and the least time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax

from scir_jax.engine.cost import memory
from scir_jax.engine.cost.chips import Chip
from scir_jax.engine.cost.flops import Flops
from scir_jax.engine.cost.memory import Memory
from scir_jax.engine.program import Program
from scir_jax.engine.programs import Programs
from scir_jax.planning.collectives import Collective, collectives

SKIPPED = "not compiled, since another one does not fit"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program on a mesh.

    Attributes:
      name, kind: the program's name and stage.
      memory: bytes per device; without what the compiler would add where `reason` says why there is no program.
      flops: of one call, over all devices.
      streamed: bytes that each device reads from its memory in one call at the least; counted for samplers only.
      collectives: of one device in one call; None where the compiled program cannot be read.
      seconds: that compilation took.
      reason: why there is no program, or None; SKIPPED where it may fit all the same.
    """

    name: str
    kind: str
    memory: Memory
    limit: int
    flops: Flops
    streamed: int = 0
    collectives: tuple[Collective, ...] | None = ()
    seconds: float = 0.0
    reason: str | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None and self.memory.total <= self.limit

    def least(self, chip: Chip, devices: int) -> dict[str, float]:
        """Computes the seconds of one call at the least, by what bounds it.

        That is every FLOP at the peak, and every byte at full bandwidth. Without collectives nothing is said of links.
        """
        bounds = {
            "arithmetic": self.flops.hardware / devices / chip.flops,
            "memory": self.streamed / chip.bandwidth,
        }
        if self.collectives is not None:
            bounds["links"] = sum(c.received for c in self.collectives) / chip.interconnect
        return bounds


def survey(
    run: Programs,
    limit: int,
    advance: Callable[[str], None],
    only: Callable[[Program], bool] | None = None,
    *,
    more: Sequence[Program] = (),
    instead: Mapping[str, Program] | None = None,
    done: Callable[[Stage], None] = lambda stage: None,
) -> list[Stage]:
    """Compiles a run's programs, unless the weights of one alone do not fit.

    Args:
      limit: bytes that a program may use on a device.
      advance: is told each program's name before it is compiled.
      only: says whether a program is wanted.
      more: programs beside those of the model, on the same mesh.
      instead: stage -> program that takes the place of that for the longest rows.
      done: is told of each program that is compiled.
    """
    found = [
        (instead or {}).get(program.stage, program)
        for program in (*run.all(longest=True), *more)
        if only is None or only(program)
    ]
    # A run needs all of them: where one is too large for certain, the others need not be compiled to know it.
    hopeless = any(program.known.total > limit for program in found)
    stages = []
    for program in found:
        advance(program.name)
        stages.append(_stage(run, program, limit, hopeless))
        done(stages[-1])
    return stages


def _stage(run: Programs, program: Program, limit: int, hopeless: bool) -> Stage:
    stage = Stage(program.name, program.stage, program.known, limit, program.flops, program.streamed)
    if program.known.total > limit:
        return dataclasses.replace(stage, reason="too large before a single activation; not compiled")
    if hopeless:
        return dataclasses.replace(stage, reason=SKIPPED)
    started = time.monotonic()
    try:
        compiled = program.compile(run.mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(stage, seconds=time.monotonic() - started, reason=_short(str(error)))
    return dataclasses.replace(
        stage,
        memory=memory.whole(program.known, compiled, run.backend),
        collectives=_collectives(compiled),
        seconds=time.monotonic() - started,
    )


def _collectives(compiled: jax.stages.Compiled) -> tuple[Collective, ...] | None:
    """Counts the collectives of a compiled program; None where it has instructions that this jaxlib cannot read."""
    try:
        with _silent():
            text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        # jaxlib may be older than the compiler in libtpu.
        if "INTERNAL" not in str(error):
            raise
        return None
    return tuple(collectives(text))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps from the terminal what compiled libraries write to stderr: pages for an error that is caught."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _short(error: str) -> str:
    """Writes the compiler's refusal in a few words."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", error)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of", error)
    return f"the compiler finds no way: {found[1]} {found[2]}iB" if found else "the compiler finds no way"
