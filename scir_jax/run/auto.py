"""Proposes what a user has not set: collects the facts, and says what is proposed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from rich.table import Table

from scir_jax.config.files import to_dict
from scir_jax.config.schema import Config
from scir_jax.data import records
from scir_jax.data.records import Comparison
from scir_jax.data.tally import Tally
from scir_jax.engine.cost import memory
from scir_jax.engine.hosts import hosts
from scir_jax.errors import InputError
from scir_jax.model import families
from scir_jax.model.hf import weights
from scir_jax.run import console, hub, proposals
from scir_jax.run.directory import RunDirectory
from scir_jax.run.proposals import Facts
from scir_jax.run.setup import stop_ids
from scir_jax.text.chat import Chat, load_tokenizer
from scir_jax.text.judge import compile_judge, load_template

SAMPLE = 2000
"""rows of a file whose tokens are counted, evenly over the file"""


class Target(NamedTuple):
    """Devices to propose for: what they are ("cpu", "gpu" or "tpu"), how many, and the bytes each has for programs."""

    backend: str
    devices: int
    limit: int


def here() -> Target:
    """Describes the devices that are here, all hosts' together."""
    backend = {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())
    return Target(backend, jax.device_count(), min(hosts.gather(memory.limit())))


SECTIONS = tuple(field.name for field in dataclasses.fields(Config))


def settle(
    config: Config,
    given: Collection[str],
    kinds: Collection[str] = tuple(proposals.PROPOSALS),
    *,
    sections: Collection[str] = SECTIONS,
    target: Target | None = None,
    known: Callable[[str], tuple[dict, str]] | None = None,
    begun: bool = False,
    pairs: Sequence[Comparison] = (),
) -> Config:
    """Returns the configuration with proposals where nothing is given, if run.auto is set; says what they are.

    Args:
      config: resolved.
      given: keys of the settings that the user set.
      kinds, sections: of proposals.PROPOSALS and of the configuration, those that the command has a use for.
      target: devices to propose for; those here by default.
      known: model.path -> its config.json, and where that is, for a model that need not be there.
      begun: a run that has begun in run.directory keeps what was proposed for it.
      pairs: whose tokens count beside those of the data files.

    Raises:
      InputError: the model or the prompts are missing or cannot be read.
    """
    if not config.run.auto:
        return config
    if config.world.directory:
        raise InputError(
            "run.auto proposes settings for a model of your own, and the embedded world has its settings; set "
            "world.directory to null, or run.auto to false"
        )
    if not {"model.path", "model"} & set(given):
        raise InputError("no model: give --model DIR, the directory with config.json, *.safetensors and the tokenizer")
    before = _recorded(config) if begun else None
    if before is not None:
        return _as_before(config, given, before)
    target = target or here()
    facts = hosts.together(lambda: facts_of(config, target, known, pairs))
    config, found = proposals.propose(facts, config, given, kinds, sections)
    if found:
        _show(found)
    reasons = {key: proposal.reason for key, proposal in found.items()}
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, proposed=reasons))
    hosts.same(to_dict(config), "proposed settings")
    return config


def facts_of(
    config: Config,
    target: Target,
    known: Callable[[str], tuple[dict, str]] | None = None,
    pairs: Sequence[Comparison] = (),
) -> Facts:
    """Collects the facts that proposals follow from; without a tokenizer, of a `known` model, nothing about texts."""
    directory = hub.directory(config.model.path, "model.path") if known is None else Path(config.model.path)
    if known is None:
        hf_config, where = weights.hf_config(directory), str(directory / "config.json")
    else:
        hf_config, where = known(config.model.path)
    arch = families.read(hf_config, where)
    if known is not None and not any(directory.glob("tokenizer*")):
        return Facts(arch, *target)
    tokenizer = load_tokenizer(directory)
    options = config.text.chat_template_kwargs
    thinks = not options and "enable_thinking" in str(tokenizer.chat_template)
    if thinks:
        options = {"enable_thinking": False}
    chat = Chat(tokenizer, str(directory), stop_ids(directory, hf_config), options)
    judges = {}
    for name in proposals.JUDGES:
        try:
            judges[name] = compile_judge(load_template(name), chat).fixed_tokens
        except InputError:  # another template may do, and where none does the run says why
            continue
    prompts, rows, answers = _lengths(config, chat, pairs)
    return Facts(arch, *target, prompts, rows, answers, judges, thinks)


def _lengths(config: Config, chat: Chat, pairs: Sequence[Comparison]) -> tuple[list[int], int, list[int]]:
    """Counts tokens of prompts, rows of data.prompts, and tokens of given answers."""
    data = config.data

    def read(function, key: str, **more) -> list:
        path = getattr(data, key)
        tally = Tally(path or "", data.on_bad_row, data.max_bad_rows)
        return list(function(path, data.columns, tally, **more)) if path else []

    conversations = [messages for _, messages in read(records.read_prompts, "prompts")]
    rows = len(conversations)
    conversations = _some(conversations)
    conversations += [messages for _, messages in _some(read(records.read_prompts, "heldout_prompts"))]
    answers: list[str] = []
    files = (read(records.read_comparisons, key) for key in ("pairs", "eft", "heldout_pairs"))
    for compared in (pairs, *files):
        for pair in _some(compared):
            conversations.append(pair.messages)
            answers += [pair.a, pair.b]
    for _, messages in _some(read(records.read_conversations, "ift")):
        answers += [message["content"] for message in messages if message["role"] == "assistant"]
    return _counted(chat.prompt, conversations), rows, _counted(chat.answer, answers)


def _counted(encode: Callable[[Any], Sequence[int]], items: Sequence) -> list[int]:
    """Counts the tokens of each item; the run says what is wrong with one that cannot be encoded."""
    found = []
    for item in items:
        with contextlib.suppress(InputError):
            found.append(len(encode(item)))
    return found


def _some(rows: Sequence) -> list:
    """Returns at most SAMPLE of the rows, evenly over all."""
    count = min(len(rows), SAMPLE)
    return [rows[len(rows) * i // count] for i in range(count)]


def _recorded(config: Config) -> dict | None:
    """Returns the configuration of the run that has begun in the run directory, or None."""
    directory = RunDirectory(config.run.directory)
    recorded = directory.path / "config.yaml"
    if not recorded.is_file() or not directory.begun:
        return None
    try:
        content = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        return None  # the run directory says what is wrong with it
    return content if isinstance(content, dict) else None


def _as_before(config: Config, given: Collection[str], before: dict) -> Config:
    """Takes the settings that were proposed for a run when it began."""
    reasons = (before.get("run") or {}).get("proposed") or {}
    if reasons:
        console.say(
            "settings that were proposed when the run began stay: see run.proposed in "
            f"{config.run.directory}/config.yaml"
        )
    for key in reasons:
        section, name = key.split(".")
        if key not in given and name in before.get(section, {}):
            value = before[section][name]
            config = proposals.with_value(config, key, tuple(value) if isinstance(value, list) else value)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, proposed=reasons))


def _show(found: dict[str, proposals.Proposal]) -> None:
    title = "proposed settings; any that you give wins"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("setting", "value", "because"):
        table.add_column(name)
    for key, proposal in found.items():
        value = proposal.value
        shown = (
            ", ".join(map(str, value))
            if isinstance(value, tuple)
            else value
            if isinstance(value, str)
            else json.dumps(value)
        )
        table.add_row(key, shown, proposal.reason)
    console.show(table)
