"""The compiled programs of a run, ready before its first step: what memory each needs, and whether that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from scir_jax.data.rows import PairBatch, Rows, Targets, TrainBatch
from scir_jax.engine import memory, sampler
from scir_jax.engine.memory import GIB, Memory
from scir_jax.engine.mesh import batch_sharding, batch_shards
from scir_jax.errors import InputError
from scir_jax.loop import console
from scir_jax.loop.session import Session
from scir_jax.method.objective import reward_names
from scir_jax.model.lora import join


class Program(NamedTuple):
    """A jitted function with abstract arguments, and the part of its memory that is known without compiling."""

    name: str
    function: Any
    arguments: tuple
    known: Memory


def programs(session: Session) -> Iterator[Program]:
    """The programs of a run. InputError, as everywhere, where its data do not fit its settings."""
    config = session.config
    inference = join(session.abstract_inference, session.abstract_frozen)
    weights = Memory(weights=memory.device_bytes(inference))
    counts = {config.sample.responses} if config.run.iterations and not config.data.pairs else set()
    if session.data.heldout_prompts:
        counts |= {config.evaluate.samples} | ({1} if config.evaluate.greedy else set())
    for count in sorted(counts):
        yield _sampler(session, inference, weights, count)
    if config.run.iterations or session.data.heldout_pairs:
        size = 2 * config.evaluate.batch_size
        yield Program("score responses", session.scorer, (inference, _rows((size,), session.shapes.scored)), weights)
        rows = tuple(_rows((config.evaluate.batch_size, 2), tokens) for tokens in session.shapes.judges)
        yield Program("judge pairs", session.judge, (inference, rows), weights)
    yield from _steps(session)


def check_memory(session: Session) -> list[tuple[str, Memory]]:
    """Compiles a run's programs and prints the memory of each; the compiled programs are those that the run uses.

    What cannot fit whatever the compiler does is refused before compiling.

    Raises:
      InputError: where a program needs more than a device has.
    """
    limit = memory.limit()
    found = list(programs(session))
    _fits([(program.name, program.known) for program in found], limit, session)
    result = []
    with console.stage("compile", len(found)) as bar:
        for program in found:
            bar.advance(program.name, by=0)
            try:
                compiled = program.function.lower(*_placed(program.arguments, session)).compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                reason = " ".join(str(error).split())[:200]
                # The rest is unknown, but it is what does not fit.
                advice = _advice(session, dataclasses.replace(program.known, other=limit))
                raise InputError(f"{program.name}: does not fit on a device ({reason}); {advice}") from None
            other = max(memory.compiled_bytes(compiled) - program.known.total, 0)
            result.append((program.name, dataclasses.replace(program.known, other=other)))
            bar.advance(program.name)
    _print(result, limit)
    _fits(result, limit, session)
    return result


def _placed(arguments: tuple, session: Session) -> tuple:
    """Abstract arguments with the shardings that the real ones will have, or they would be compiled for again."""
    sharding = batch_sharding(session.mesh)

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return leaf

    return jax.tree.map(place, arguments)


def _steps(session: Session) -> Iterator[Program]:
    config, trainer = session.config, session.trainer
    state = trainer.abstract_state()
    frozen = session.abstract_frozen
    trained = memory.device_bytes(state.params)
    known = Memory(
        weights=trained + memory.device_bytes(frozen),
        optimiser=memory.device_bytes(state.opt_state),
        gradients=trained,
    )
    key = trainer.dropout_key(0, 0)

    def step(name: str, batch: TrainBatch) -> Program:
        return Program(name, trainer.step, (state, frozen, batch, np.float32(0), key), known)

    def targets(rows: Any, size: int, tokens: int) -> Targets | None:
        return Targets(_int32(size, tokens), _float32(size, tokens)) if rows and size else None

    def replay(section: Any) -> dict[str, Targets | None]:
        return {
            "ift": targets(session.data.ift_rows, section.ift_batch_size, session.shapes.ift),
            "eft": targets(session.data.eft_rows, section.eft_batch_size, session.shapes.eft),
        }

    supervised = replay(config.sft)
    if config.sft.epochs and any(supervised.values()):
        yield step("SFT step", TrainBatch(None, **supervised))
    if config.run.iterations:
        rest = replay(config.replay) if config.replay.weight else {"ift": None, "eft": None}
        yield step("SCIR step", TrainBatch(_pairs(session), **rest))


def _sampler(session: Session, params: Any, weights: Memory, responses: int) -> Program:
    size = session.config.sample.batch_size
    places = session.shapes.prompt + session.shapes.response
    arch, itemsize = session.arch, np.dtype(jax.numpy.dtype(session.config.model.dtype)).itemsize
    rows = size * responses // batch_shards(session.mesh)
    cache = 2 * arch.num_layers * rows * places * arch.num_kv_heads * arch.head_dim * itemsize
    key = sampler.stream_key(0, "responses", 0)
    arguments = (
        params,
        _int32(size, session.shapes.prompt),
        _int32(size),
        _int32(size),
        key,
        sampler.Sampling.of(1.0),
    )
    return Program(
        f"sample {responses} a prompt",
        session.sampler(responses),
        arguments,
        dataclasses.replace(weights, cache=cache),
    )


def _pairs(session: Session) -> PairBatch:
    size = session.config.optimise.batch_size
    shapes, encoder = session.shapes, session.encoder
    separate = shapes.judges[1:] if encoder.continued else shapes.judges
    both = _float32(size, 2)
    return PairBatch(
        responses=_rows((size, 2), shapes.row),
        judges=tuple(_rows((size, 2), tokens) for tokens in separate),
        preference_logps=both,
        implicit_logps=both,
        start_logps=both,
        length_penalty=both,
        frozen_logits=_float32(size, len(reward_names(session.config))),
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


def _fits(needs: list[tuple[str, Memory]], limit: int, session: Session) -> None:
    """InputError about the largest program where it is larger than the limit."""
    name, need = max(needs, key=lambda item: item[1].total, default=("", Memory()))
    if need.total > limit:
        kinds = {kind: value for kind, value in dataclasses.asdict(need).items() if value}
        largest = ", ".join(f"{kind} {_gib(value)}" for kind, value in sorted(kinds.items(), key=lambda x: -x[1]))
        raise InputError(
            f"{name}: needs {_gib(need.total)} GiB a device ({largest}) of the {_gib(limit)} there are; "
            f"{_advice(session, need)}"
        )


def _advice(session: Session, need: Memory) -> str:
    """What would make a program smaller, without what is set already."""
    config = session.config
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
    if training and session.model.lora is None:
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
