"""The compiled programs of a run, ready before its first step: what memory each needs, and whether that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from scir_jax.data.rows import PairBatch, Rows, Targets, TrainBatch
from scir_jax.engine import hosts, memory, sampler
from scir_jax.engine.memory import GIB, Memory
from scir_jax.engine.mesh import batch_sharding, batch_shards
from scir_jax.errors import InputError
from scir_jax.loop import console
from scir_jax.loop.computation import Computation
from scir_jax.method.objective import reward_names
from scir_jax.model.attention import backend_of
from scir_jax.model.lora import join


class Program(NamedTuple):
    """A jitted function with abstract arguments, and the part of its memory that is known without compiling."""

    name: str
    function: Any
    arguments: tuple
    known: Memory


def programs(run: Computation) -> Iterator[Program]:
    """The programs of a run. InputError, as everywhere, where its data do not fit its settings."""
    config = run.config
    inference = join(run.abstract_inference, run.abstract_frozen)
    weights = Memory(weights=memory.device_bytes(inference))
    counts = {config.sample.responses} if config.run.iterations and not config.data.pairs else set()
    if "heldout_prompts" in run.files:
        counts |= {config.evaluate.samples} | ({1} if config.evaluate.greedy else set())
    for count in sorted(counts):
        yield _sampler(run, inference, weights, count)
    if config.run.iterations or "heldout_pairs" in run.files:
        size = 2 * config.evaluate.batch_size
        yield Program("score responses", run.scorer, (inference, _rows((size,), run.facts.shapes.scored)), weights)
        rows = tuple(_rows((config.evaluate.batch_size, 2), tokens) for tokens in run.facts.shapes.judges)
        yield Program("judge pairs", run.judge, (inference, rows), weights)
    yield from _steps(run)


def check_memory(run: Computation) -> list[tuple[str, Memory]]:
    """Compiles a run's programs and prints the memory of each; the compiled programs are those that the run uses.

    What cannot fit whatever the compiler does is refused before compiling.

    Raises:
      InputError: where a program needs more than a device has.
    """
    limit = min(hosts.gather(memory.limit()))
    found = list(programs(run))
    _fits([(program.name, program.known) for program in found], limit, run)
    result = []
    with console.stage("compile", len(found)) as bar:
        for program in found:
            bar.advance(program.name, by=0)
            try:
                compiled = compile_program(run, program)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                reason = " ".join(str(error).split())[:200]
                # The rest is unknown, but it is what does not fit.
                ways = advice(run, dataclasses.replace(program.known, other=limit))
                raise InputError(f"{program.name}: does not fit on a device ({reason}); {ways}") from None
            result.append((program.name, memory.whole(program.known, compiled, backend_of(run.model.layout))))
            bar.advance(program.name)
    _print(result, limit)
    _fits(result, limit, run)
    return result


def compile_program(run: Computation, program: Program) -> jax.stages.Compiled:
    """The program that the run's calls will find compiled, or one for a mesh of other machines' devices."""
    # Abstract arguments with the shardings that the real ones will have, or they would be compiled for again.
    sharding = batch_sharding(run.mesh)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return leaf

    return program.function.lower(*jax.tree.map(place, program.arguments)).compile()


def _steps(run: Computation) -> Iterator[Program]:
    config, trainer = run.config, run.trainer
    state = trainer.abstract_state()
    frozen = run.abstract_frozen
    trained = memory.device_bytes(state.params)
    known = Memory(
        weights=trained + memory.device_bytes(frozen),
        optimiser=memory.device_bytes(state.opt_state),
        gradients=trained,
    )
    key = trainer.dropout_key(0, 0)

    def step(name: str, batch: TrainBatch) -> Program:
        return Program(name, trainer.step, (state, frozen, batch, np.float32(0), key), known)

    def targets(there: bool, size: int, tokens: int) -> Targets | None:
        return Targets(_int32(size, tokens), _float32(size, tokens)) if there and size else None

    def replay(section: Any) -> dict[str, Targets | None]:
        return {
            "ift": targets("ift" in run.files, section.ift_batch_size, run.facts.shapes.ift),
            "eft": targets("eft" in run.files, section.eft_batch_size, run.facts.shapes.eft),
        }

    supervised = replay(config.sft)
    if config.sft.epochs and any(supervised.values()):
        yield step("SFT step", TrainBatch(None, **supervised))
    if config.run.iterations:
        rest = replay(config.replay) if config.replay.weight else {"ift": None, "eft": None}
        yield step("SCIR step", TrainBatch(_pairs(run), **rest))


def _sampler(run: Computation, params: Any, weights: Memory, responses: int) -> Program:
    size = run.config.sample.batch_size
    places = run.facts.shapes.prompt + run.facts.shapes.response
    arch, itemsize = run.arch, np.dtype(jax.numpy.dtype(run.config.model.dtype)).itemsize
    rows = size * responses // batch_shards(run.mesh)
    heads = arch.num_kv_heads // run.mesh.shape["tensor"]
    cache = 2 * arch.num_layers * rows * places * heads * arch.head_dim * itemsize
    key = sampler.stream_key(0, "responses", 0)
    arguments = (
        params,
        _int32(size, run.facts.shapes.prompt),
        _int32(size),
        _int32(size),
        key,
        sampler.Sampling.of(1.0),
    )
    return Program(
        f"sample {responses} a prompt",
        run.sampler(responses),
        arguments,
        dataclasses.replace(weights, cache=cache),
    )


def _pairs(run: Computation) -> PairBatch:
    size = run.config.optimise.batch_size
    shapes = run.facts.shapes
    separate = shapes.judges[1:] if run.facts.continued else shapes.judges
    both = _float32(size, 2)
    return PairBatch(
        responses=_rows((size, 2), shapes.row),
        judges=tuple(_rows((size, 2), tokens) for tokens in separate),
        preference_logps=both,
        implicit_logps=both,
        start_logps=both,
        length_penalty=both,
        frozen_logits=_float32(size, len(reward_names(run.config))),
        external=_float32(size),
        weight=_float32(size),
        index=_int32(size),
    )


def _rows(leading: tuple[int, ...], tokens: int) -> Rows:
    return Rows(_int32(*leading, tokens), _int32(*leading), _int32(*leading), _int32(*leading))


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def _fits(needs: list[tuple[str, Memory]], limit: int, run: Computation) -> None:
    """InputError about the largest program where it is larger than the limit."""
    name, need = max(needs, key=lambda item: item[1].total, default=("", Memory()))
    if need.total > limit:
        kinds = {kind: value for kind, value in dataclasses.asdict(need).items() if value}
        largest = ", ".join(f"{kind} {_gib(value)}" for kind, value in sorted(kinds.items(), key=lambda x: -x[1]))
        raise InputError(
            f"{name}: needs {_gib(need.total)} GiB a device ({largest}) of the {_gib(limit)} there are; "
            f"{advice(run, need)}"
        )


def advice(run: Computation, need: Memory) -> str:
    """What would make a program smaller, without what is set already."""
    config = run.config
    training = bool(need.optimiser)
    ways = []
    if config.model.dtype == "float32":
        ways.append("model.dtype bfloat16")
    if need.other + need.cache > need.weights + need.optimiser + need.gradients:
        if training:
            ways += ["model.remat full"] if config.model.remat != "full" else []
            ways += ["a larger optimizer.accumulate"]
        ways.append(f"smaller batches ({'optimise, sft' if training else 'sample, evaluate'})")
        ways.append("smaller text.max_prompt_tokens and text.max_response_tokens")
    if training and run.model.lora is None:
        ways += ["adapters (lora.rank 16)"]
        ways += ["optimizer.kind adafactor"] if config.optimizer.kind == "adamw" else []
    ways.append("more devices (mesh.fsdp)")
    if jax.default_backend() == "gpu":
        ways.append("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment")
    return "try " + ", ".join(ways)


def _print(result: list[tuple[str, Memory]], limit: int) -> None:
    largest = max((need.total for _, need in result), default=0)
    unit, name_of_unit = (GIB, "GiB") if largest > GIB else (2**20, "MiB")
    title = f"memory a device, {name_of_unit} (of {limit / GIB:.1f} GiB)"
    table = Table(title=title, title_justify="left")
    table.add_column("program", no_wrap=True)
    kinds = [field.name for field in dataclasses.fields(Memory)]
    for kind in (*kinds, "total"):
        table.add_column(kind, justify="right", no_wrap=True)
    for name, need in result:
        values = [getattr(need, kind) for kind in kinds]
        table.add_row(name, *(f"{value / unit:.1f}" if value else "-" for value in (*values, need.total)))
    console.show(table)


def _gib(value: int) -> str:
    return f"{value / GIB:.2f}" if value >= GIB / 100 else f"{value / GIB:.1e}"
