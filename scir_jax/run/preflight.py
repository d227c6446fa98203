"""Before the first step: the data are read and checked, every program is compiled, and its memory is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.table import Table

from scir_jax.config.schema import Config
from scir_jax.data import statistics
from scir_jax.data.jsonl import read_json
from scir_jax.data.packing import Shape
from scir_jax.data.pipelines import check_bins
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.cost import memory
from scir_jax.engine.cost.memory import GIB, Memory
from scir_jax.engine.hosts import hosts
from scir_jax.engine.program import Program
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.model import families
from scir_jax.model.architecture import Architecture
from scir_jax.model.hf import weights
from scir_jax.run import console, hub
from scir_jax.run.changes import MODELS
from scir_jax.run.directory import RunDirectory, settings_of
from scir_jax.run.inputs import Inputs
from scir_jax.run.models import adapters_of, copied, start_of
from scir_jax.text.chat import Chat, load_tokenizer


def check_inputs(config: Config, inputs: Inputs, programs: Programs) -> dict[str, Any]:
    """Reads and checks everything that the run will need, before anything is computed, and shows what it holds.

    Returns:
      The content of data.json.

    Raises:
      InputError: there is nothing to train on, or something cannot be used.
    """
    if config.run.iterations and not inputs.prompts and not inputs.given_pairs:
        raise InputError("no prompts to train on: give --prompts FILE (data.prompts), or data.pairs")
    if config.data.pairs and len(inputs.given_pairs) < config.run.iterations:
        raise InputError(
            f"{config.data.pairs}: {len(inputs.given_pairs)} pairs are too few for "
            f"run.iterations={config.run.iterations}"
        )
    if config.preference.labels == "external" and not config.data.pairs and not config.pairs.scorer:
        name = config.data.columns.label[0]
        console.say(
            f"labels come from the column {name!r} that you add to each iteration's pairs.jsonl; "
            "the run stops there until it is present"
        )
    _check_start(config, programs)
    check_references(config, programs.arch, inputs.encoder.chat)
    # Answers are not there yet; what else is learned is.
    check_bins(programs.way, ((len(row.ids), row.where) for rows in inputs.targets.values() for row in rows))
    console.show(statistics.table(inputs.statistics()))
    inputs.tell_left_out()
    for sentence in missing(config, inputs):
        console.say(f"note: {sentence}")
    return inputs.to_dict()


def missing(config: Config, inputs: Inputs) -> list[str]:
    """Says what the configuration asks for and the data do not allow, so that the run goes without it."""
    found = []
    taught = {name for name, rows in inputs.targets.items() if rows}
    sft = {"ift": config.sft.ift_batch_size, "eft": config.sft.eft_batch_size}
    if config.sft.epochs and not config.run.start_from and not any(sft[name] for name in taught):
        found.append("no data.ift and no data.eft, so that there is no SFT: M1 is the model itself")
    replay = {"ift": config.replay.ift_batch_size, "eft": config.replay.eft_batch_size}
    if config.run.iterations and config.replay.weight and not any(replay[name] for name in taught):
        found.append("no data to replay: replay.weight has no effect")
    if not inputs.heldout_pairs:
        found.append("no data.heldout_pairs: the table cannot show whether the reward models are right")
    if not inputs.heldout_prompts:
        found.append("no data.heldout_prompts and no data.holdout: the table cannot show lengths and diversity")
    return found


def _check_start(config: Config, programs: Programs) -> None:
    """Refuses to start from models that are not there, or have other adapters, which may have the shapes of ours."""
    settings, start = config.run, start_of(config)
    if start is None or ModelStore(RunDirectory(settings.directory).checkpoints).exists(1):
        return
    theirs = ModelStore(RunDirectory(start[0]).checkpoints)
    if missing := [name for name in copied(config).values() if not theirs.exists(name)]:
        which = f"M{missing[0]}" if isinstance(missing[0], int) else f"{missing[0]!r}, which a reference of this run is"
        raise InputError(f"run.start_from {settings.start_from}: {start[0]} holds no model {which}")
    if not (start[0] / "config.yaml").is_file():
        return
    other = settings_of(start[0])
    adapters, ours = adapters_of(other.lora), programs.model.lora
    # Their dropout need not be ours: it is no part of a model.
    if (adapters and adapters.computes) != (ours and ours.computes):
        raise InputError(
            f"run.start_from {settings.start_from}: its models have {adapters or 'no adapters'}, this run's have "
            f"{ours or 'none'}; set lora as it is there"
        )


def check_frozen(config: Config, hashes: dict[str, str]) -> None:
    """Refuses to start from adapters that were trained on other weights than those of model.path.

    Args:
      hashes: this run's, as its manifest has them.
    """
    start = start_of(config)
    recorded = start and start[0] / "manifest.json"
    if not recorded or not recorded.is_file():
        return
    theirs = read_json(recorded)["sha256"]
    for name, value in hashes.items():
        if name.endswith(".safetensors") and name.startswith("model.path/") and theirs.get(name) != value:
            raise InputError(
                f"run.start_from {config.run.start_from}: its adapters belong to another model than "
                f"{config.model.path} ({name.removeprefix('model.path/')} differs); set model.path as it is there"
            )


def check_references(config: Config, arch: Architecture, chat: Chat) -> None:
    """Refuses a reference that is a model with another architecture or vocabulary.

    Args:
      arch, chat: of the run's model.

    Raises:
      InputError: there is such a reference, or one is missing.
    """
    references = {"implicit.reference": config.implicit.reference, "preference.reference": config.preference.reference}
    for key, name in references.items():
        if name in MODELS:
            continue
        path = hub.directory(name, key)
        if families.read(weights.hf_config(path), str(path / "config.json")) != arch:
            raise InputError(f"{key} {name}: has another architecture than {config.model.path}")
        if load_tokenizer(path).get_vocab() != chat.tokenizer.get_vocab():
            raise InputError(f"{key} {name}: its tokenizer has another vocabulary than that of {config.model.path}")


def check_memory(config: Config, programs: Programs, more: Sequence[Program] = ()) -> list[tuple[str, Memory]]:
    """Compiles a run's programs and prints the memory of each; the compiled programs are those that the run uses.

    What cannot fit whatever the compiler does is refused before compiling. A packed step is compiled for the longest
    rows here, which real ones hardly ever are all; see `check_shapes`.

    Args:
      more: programs beside those of the model.

    Raises:
      InputError: where a program needs more than a device has.
    """
    limit = min(hosts.gather(memory.limit()))
    found = [*programs.all(), *more]
    _fits([(program.name, program.known) for program in found], limit, config, programs)
    # SFT comes next, and has its own table.
    packed = [program.name for program in found if program.stage == "optimise" and programs.way.kind != "off"]
    found = [program for program in found if program.stage != "sft" or programs.way.kind == "off"]
    result = []
    with console.stage("compile", len(found)) as bar:
        for program in found:
            need = _compiled(program, limit, config, programs, bar, needed=program.name not in packed)
            result += [] if need is None else [(program.name, need)]
    _print(result, limit)
    _fits([item for item in result if item[0] not in packed], limit, config, programs)
    for name, need in result:
        if name in packed and need.total > limit:
            _say_large(name, _gib(need.total))
    return result


def check_shapes(
    config: Config, programs: Programs, title: str, shapes: Sequence[Shape], program: Callable[[Shape], Program]
) -> None:
    """Compiles the shapes of a stage's step before its first one, and prints their memory; nothing if it is not packed.

    Raises:
      InputError: where one needs more than a device has.
    """
    if programs.way.kind == "off":
        return
    limit = min(hosts.gather(memory.limit()))
    result = []
    with console.stage(f"{title}: compile", len(shapes)) as bar:
        for shape in shapes:
            made = program(shape)
            if (made.stage, shape) not in programs.needs:
                programs.needs[made.stage, shape] = _compiled(made, limit, config, programs, bar)
            result.append((made.name, programs.needs[made.stage, shape]))
    _print(result, limit)
    _fits(result, limit, config, programs)


def _compiled(
    program: Program, limit: int, config: Config, programs: Programs, bar: console.Bar, *, needed: bool = True
) -> Memory | None:
    """Compiles a program -> its memory.

    Args:
      needed: the program must fit; else there is None for one that the compiler finds too large.
    """
    bar.advance(program.name, by=0)
    try:
        compiled = program.compile(programs.mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        bar.advance(program.name)
        if not needed:
            _say_large(program.name, "more than the device's")
            return None
        # The rest is unknown, but it is what does not fit.
        ways = advice(config, programs, dataclasses.replace(program.known, other=limit))
        raise InputError(f"{program.name}: does not fit on a device ({reason}); {ways}") from None
    bar.advance(program.name)
    return memory.whole(program.known, compiled, programs.backend)


def _say_large(name: str, need: str) -> None:
    console.say(
        f"{name}: if all its rows were as long as text allows, it would need {need} GiB and not fit; the shapes that "
        "the real rows need are checked before its first step"
    )


def _fits(needs: list[tuple[str, Memory]], limit: int, config: Config, programs: Programs) -> None:
    """Raises InputError about the largest program where it is larger than the limit."""
    name, need = max(needs, key=lambda item: item[1].total, default=("", Memory()))
    if need.total > limit:
        kinds = {kind: value for kind, value in dataclasses.asdict(need).items() if value}
        largest = ", ".join(f"{kind} {_gib(value)}" for kind, value in sorted(kinds.items(), key=lambda x: -x[1]))
        raise InputError(
            f"{name}: needs {_gib(need.total)} GiB per device ({largest}) of the {_gib(limit)} there are; "
            f"{advice(config, programs, need)}"
        )


def advice(config: Config, programs: Programs, need: Memory) -> str:
    """Says what would make a program smaller, without what is set already."""
    training = bool(need.optimiser)
    ways = []
    if config.model.dtype == "float32":
        ways.append("model.dtype bfloat16")
    if need.other + need.cache > need.weights + need.optimiser + need.gradients:
        if training:
            ways += ["model.remat full"] if config.model.remat != "full" else []
            ways += ["a larger training.accumulate"]
        ways.append(f"smaller batches ({'optimise, sft' if training else 'sample, evaluate'})")
        ways.append("smaller text.max_prompt_tokens and text.max_response_tokens")
    if training and programs.model.lora is None:
        ways += ["adapters (lora.rank 16)"]
        ways += ["training.optimizer adafactor"] if config.training.optimizer != "adafactor" else []
    ways.append("more devices (mesh.fsdp)")
    if jax.default_backend() == "gpu":
        ways.append("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment")
    return "try " + ", ".join(ways)


def _print(result: list[tuple[str, Memory]], limit: int) -> None:
    largest = max((need.total for _, need in result), default=0)
    unit, name_of_unit = (GIB, "GiB") if largest > GIB else (2**20, "MiB")
    title = f"memory per device, {name_of_unit} (of {limit / GIB:.1f} GiB)"
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
