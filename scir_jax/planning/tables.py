"""What a plan prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from scir_jax.config.schema import Config
from scir_jax.engine.cost.memory import GIB, Memory
from scir_jax.engine.program import Program
from scir_jax.engine.programs import Programs
from scir_jax.planning import iteration, stages
from scir_jax.planning.batches import Largest
from scir_jax.planning.limits import reward_programs
from scir_jax.planning.machine import Machine
from scir_jax.planning.stages import Stage
from scir_jax.planning.workload import Workload
from scir_jax.run import console, hub
from scir_jax.run.preflight import advice


def show_machine(run: Programs, machine: Machine, load: Workload | None) -> None:
    """Shows the model, the machine and the lengths of rows."""
    chip, config, lengths = machine.chip, run.config, run.facts.lengths
    how = f"{run.model.lora}" if run.model.lora else "full fine-tuning"
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    hosts = f" on {machine.hosts} host(s)" if machine.hosts else ""
    _print(
        f"{config.model.path}: {run.arch.parameter_count():,} parameters, {how}, {config.model.dtype}, "
        f"remat {config.model.remat}"
    )
    _print(f"{machine.name}: {machine.chips} chip(s), {len(machine.devices)} device(s){hosts}, mesh {mesh}")
    if chip:
        _print(
            f"a device: {chip.flops / 1e12:.0f} TFLOP/s bfloat16, {machine.limit / GIB:.2f} of {chip.memory / GIB:.0f} "
            f"GiB usable, {chip.bandwidth / 1e9:.0f} GB/s memory, {chip.interconnect / 1e9:.0f} GB/s links "
            f"({chip.source})"
        )
    else:
        _print(f"a device: {machine.limit / GIB:.2f} GiB; its speed is not in the table of chips: no times are given")
    _print(
        f"rows at the limits of `text`: prompts {lengths.prompt}, answers {lengths.answer}; a training step has "
        f"{', '.join(f'{group.rows} x {group.tokens}' for group in run.optimise_spec.groups)} tokens (about: a "
        "template's tokens are estimated)"
    )
    if load is not None:
        packed = f"{run.way.kind}, {load.real:.0%} of the places hold a token" if load.shape else "not packed"
        _print(f"lengths as stated ({load.source}): answers of {load.answer:.0f} tokens; training steps: {packed}")


def survey(run: Programs, machine: Machine, load: Workload | None, kinds: Sequence[str]) -> list[Stage]:
    """Compiles the run's programs of some stages, and says of each what it needs as soon as it is compiled."""

    def wanted(program: Program) -> bool:
        return program.stage in kinds

    def say(stage: Stage) -> None:
        need = f"{stage.memory.total / GIB:.2f} of {machine.limit / GIB:.2f} GiB per device"
        console.say(f"{stage.name}: {stage.reason or need}, {stage.seconds:.0f} s")

    instead = {}
    if load is not None:
        instead = {"decode": run.decode_program(load.seen)}
        instead |= {"optimise": run.optimise_program(load.shape)} if load.shape else {}
    with console.stage("compile", 0) as bar:
        return stages.survey(
            run,
            machine.limit,
            lambda name: bar.advance(name, by=0),
            wanted,
            more=reward_programs(run),
            instead=instead,
            done=say,
        )


def show_stages(run: Programs, found: Sequence[Stage], machine: Machine) -> None:
    """Shows what fits, and bytes per device by kind."""
    kinds = [field.name for field in dataclasses.fields(Memory)]
    largest = max(stage.memory.total for stage in found)
    unit, name = (GIB, "GiB") if largest > GIB else (2**20, "MiB")
    table = _table(
        f"memory per device, {name}, of {machine.limit / unit:.2f}", "program", "fits", *kinds, "total", "compiled"
    )
    for stage in found:
        values = [getattr(stage.memory, kind) for kind in kinds]
        cells = [f"{value / unit:.2f}" if value else "-" for value in values]
        seconds = f"{stage.seconds:.0f} s" if stage.seconds else "-"
        more = "> " if stage.reason else ""
        table.add_row(
            stage.name,
            "yes" if stage.fits else "?" if stage.reason == stages.SKIPPED else "NO",
            *cells,
            f"{more}{stage.memory.total / unit:.2f}",
            seconds,
        )
    _print(table)
    for stage in found:
        if stage.reason and stage.reason != stages.SKIPPED:
            _print(f"{stage.name}: {stage.reason}")


def show_save(run: Programs, machine: Machine) -> None:
    """Shows how large a training state is, and how long it takes to save it, as before a preemption."""
    state = run.optimise.abstract_state()
    size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))
    hosts = machine.hosts or 1
    each = f", {size / hosts / GIB:.2f} GiB per host" if hosts > 1 else ""
    _print(
        f"a checkpoint has {size / GIB:.2f} GiB{each}: at 1 GB/s per host, if disk or bucket give that, it is saved in "
        f"{_time(size / hosts / 1e9)}; a TPU VM that is preempted has 30 s, what is not saved by then is trained again"
    )


def show_times(run: Programs, found: Sequence[Stage], machine: Machine) -> None:
    """Shows FLOPs and communication of a call, and the least time that it takes."""
    devices = len(machine.devices)
    found = [stage for stage in found if stage.reason is None]
    kinds = list(dict.fromkeys(c.kind for stage in found for c in stage.collectives or ()))
    table = _table(
        "one call: PFLOP over all devices (of the mathematics, and as executed), seconds at the least by what bounds "
        "them, "
        "GiB per device by collective",
        *("program", "model", "executed", "arithmetic", "memory", "links", *kinds),
    )
    for stage in found:
        least = stage.least(machine.chip, devices)
        known = stage.collectives or ()
        sums = {kind: sum(c.bytes for c in known if c.kind == kind) for kind in kinds}
        unsure = {c.kind for c in known if c.unknown}
        table.add_row(
            stage.name,
            _number(stage.flops.model / 1e15),
            _number(stage.flops.hardware / 1e15),
            *(_number(least[bound]) if bound in least else "?" for bound in ("arithmetic", "memory", "links")),
            *(
                "?" if stage.collectives is None else f"{_number(sums[kind] / GIB)}{'+' if kind in unsure else ''}"
                for kind in kinds
            ),
        )
    _print(table)
    if any(stage.collectives is None for stage in found):
        _print(
            "?: the installed jaxlib cannot read this program of the TPU's compiler; what it exchanges is not counted."
        )
    _print(
        "arithmetic: every executed FLOP at the chips' peak; memory: what decoding must read of weights and cache; "
        "links: what a device must receive. None of them can be beaten; how far they overlap is not known "
        "before it runs."
    )


def show_iteration(
    run: Programs,
    found: Sequence[Stage],
    machine: Machine,
    load: Workload | None,
    prompts: int | None,
    share: float,
) -> None:
    """Shows the chip-hours of an iteration, with what is assumed.

    Args:
      load: what rows of stated lengths ask for; None: all are the longest.
      prompts: of the iteration; None: as the configuration says.
      share: of the least time's speed.
    """
    config = run.config
    number, source = iteration.prompts_of(config, prompts)
    costs = iteration.costs(run, found, machine.chip, len(machine.devices), number, load)
    table = _table(
        f"an iteration of {number:,} prompts ({source})", "stage", "program", "calls", "least", "estimate", "chip-hours"
    )
    for cost in costs:
        table.add_row(
            *(cost.stage, cost.program, f"{cost.calls:,}", _time(cost.least), _time(cost.least / share)),
            f"{cost.least / share / 3600 * machine.chips:.2f}",
        )
    total = sum(cost.least for cost in costs)
    table.add_row("", "together", "", _time(total), _time(total / share), f"{total / share / 3600 * machine.chips:.2f}")
    _print(table)
    sampled = config.sample.command and not config.data.pairs
    scored = config.pairs.scorer and hub.is_function(config.pairs.scorer)
    asked = [name for name, there in (("sample.command", sampled), ("pairs.scorer", scored)) if there]
    others = f", and what {' and '.join(asked)} take" if asked else ""
    counted = {cost.kind for cost in costs}
    missing = [kind for _, kind, _ in iteration.calls(run, number, load) if kind not in counted]
    absent = f" Not counted, for they do not fit or were not asked for: {', '.join(missing)}." if missing else ""
    lengths = f"lengths as stated ({load.source})" if load else "all rows and answers as long as the limits allow"
    _print(
        f"Assumed: {share:.0%} of the least time's speed (--efficiency), {lengths}, "
        f"{config.sample.responses} answers to each prompt. Compilation, loading and saving, SFT and evaluation"
        f"{others} come on top.{absent}"
    )


def show_largest(config: Config, found: Iterable[Largest], machine: Machine) -> None:
    """Shows the largest batches that fit."""
    table = _table(
        "largest batches that fit, each alone", "key", "configured", "largest", "GiB per device", "does not fit"
    )
    for one in found:
        total = f"{one.total / GIB:.2f}" if one.largest else "-"
        table.add_row(one.key, str(one.configured), str(one.largest or "none"), total, str(one.next or "-"))
    _print(table)


def verdict(run: Programs, found: Sequence[Stage], searched: bool) -> int:
    """Prints the last line, and returns the command's exit code: 0 where everything fits, else 1."""
    missing = [stage for stage in found if not stage.fits and stage.reason != stages.SKIPPED]
    if missing:
        worst = max(missing, key=lambda stage: stage.memory.total)
        need = worst.memory if worst.reason is None else dataclasses.replace(worst.memory, other=worst.limit)
        _print(f"does not fit: {', '.join(stage.name for stage in missing)}; {advice(run.config, run, need)}")
        return 1
    hint = "" if searched else "; --batch largest looks for the largest batches that do"
    _print(f"fits{hint}")
    return 0


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        left = number == 0 or column == "program"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _print(what: str | Table) -> None:
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=160)
    out.print(what, soft_wrap=isinstance(what, str), markup=False)


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "-"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
