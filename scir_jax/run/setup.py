"""From a configuration to what its stages take: tokenizer and judges, data files, programs, parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder, Lengths
from scir_jax.engine import mesh as meshes
from scir_jax.engine.descriptions import Facts
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.method import objective
from scir_jax.model import families
from scir_jax.model.architecture import Architecture
from scir_jax.model.hf import weights
from scir_jax.run import hub
from scir_jax.run.inputs import Inputs
from scir_jax.run.models import Parameters, adapters_of
from scir_jax.text.chat import Chat, load_tokenizer
from scir_jax.text.judge import compile_judge, load_template


class Setup(NamedTuple):
    """What `prepare` makes, each for the stages that ask for it."""

    encoder: Encoder
    inputs: Inputs
    programs: Programs
    parameters: Parameters


def prepare(config: Config, lengths: Callable[[Encoder, Inputs], Lengths] | None = None) -> Setup:
    """Reads the model's configuration, its tokenizer and the data files; no weights are loaded, nothing is compiled.

    Args:
      config: resolved.
      lengths: gives the static lengths; by default they are those of all data files.

    Raises:
      InputError: something of it is missing or does not fit.
    """
    arch, encoder = open_model(config)
    inputs = Inputs(config, encoder)
    found = inputs.lengths if lengths is None else lengths(encoder, inputs)
    facts = facts_of(encoder, found, inputs.present if lengths is None else frozenset())
    programs = Programs(config, arch, meshes.make_mesh(config.mesh), adapters_of(config.lora), facts)
    return Setup(encoder, inputs, programs, Parameters(config, programs))


def open_model(config: Config) -> tuple[Architecture, Encoder]:
    """Reads the model directory but for its weights, and compiles the judge templates for its tokenizer.

    Raises:
      InputError: the directory, its tokenizer or a template cannot be used.
    """
    directory = hub.directory(config.model.path, "model.path")
    hf_config = weights.hf_config(directory)
    arch = families.read(hf_config, str(directory / "config.json"))
    chat = Chat(
        load_tokenizer(directory), str(directory), stop_ids(directory, hf_config), config.text.chat_template_kwargs
    )
    if chat.tokenizer.vocab_size and len(chat.tokenizer) > arch.vocab_size:
        raise InputError(
            f"{config.model.path}: the tokenizer has {len(chat.tokenizer)} tokens, the embedding "
            f"{arch.vocab_size} rows; use the tokenizer that belongs to the model"
        )
    settings = config.generative
    judges = [compile_judge(load_template(name), chat) for name in settings.templates]
    pointwise = compile_judge(load_template(settings.pointwise, pointwise=True), chat) if rates(config) else None
    quote_thinking = settings.quote_thinking
    return arch, Encoder(
        config.text, chat, judges, arch.max_positions, pointwise=pointwise, quote_thinking=quote_thinking
    )


def rates(config: Config) -> bool:
    """Checks whether a run gives points to answers: in training or, for a reward model of the method, in evaluation."""
    return objective.needs(config).pointwise or "pointwise" in config.rewards.models


def facts_of(encoder: Encoder, lengths: Lengths, present: frozenset[str]) -> Facts:
    """Puts together what the programs depend on beside configuration, architecture and mesh."""
    return Facts(
        lengths=lengths,
        verdict_ids=tuple(judge.verdict_ids for judge in encoder.judges),
        continued=encoder.continued,
        stop_ids=encoder.chat.stop_ids,
        pad_id=encoder.chat.pad_id,
        present=present,
        point_ids=encoder.pointwise.verdict_ids if encoder.pointwise else (),
    )


def templates_of(encoder: Encoder) -> dict[str, dict[str, Any]]:
    """Returns the judge templates by name, as the manifest has them."""
    judges = (*encoder.judges, *([encoder.pointwise] if encoder.pointwise else []))
    return {judge.template.name: dataclasses.asdict(judge.template) for judge in judges}


def stop_ids(directory: Path, hf_config: dict) -> tuple[int, ...]:
    """Reads the end-of-sequence ids of generation_config.json and config.json.

    Raises:
      InputError: generation_config.json is not readable, or one of them names no ids.
    """
    path = directory / "generation_config.json"
    files = {path: weights.read_json(path)} if path.exists() else {}
    found: list[int] = []
    for file, content in (files | {directory / "config.json": hf_config}).items():
        value = content.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int for one in ids):
            raise InputError(f"{file}: eos_token_id must be a token's id or a list of them, not {value!r}")
        found += ids
    return tuple(dict.fromkeys(found))
