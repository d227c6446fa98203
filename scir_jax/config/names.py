"""The names of settings on a command line: dotted keys, short names for what everybody sets, the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from scir_jax.config.files import keys, read
from scir_jax.config.schema import Config

SHORT = {
    "model": ("model.path", "DIR"),
    "prompts": ("data.prompts", "FILE"),
    "run": ("run.directory", "NAME"),
    "iterations": ("run.iterations", "N"),
    "ift": ("data.ift", "FILE"),
    "eft": ("data.eft", "FILE"),
    "heldout_prompts": ("data.heldout_prompts", "FILE"),
    "heldout_pairs": ("data.heldout_pairs", "FILE"),
    "auto": ("run.auto", "true|false"),
}
"""short name -> the setting, and what its value is called"""
RUNS = "runs"
"""where runs lie that are named without a directory"""
OF_MODELS = ("sample", "judge", "compare")
"""commands that read settings of the run's section and no run directory"""
HUB = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?")
"""a model on the Hugging Face hub, unless there is a directory of that name"""
OWN = ("model.path", "data.prompts")
"""settings that say that a model or prompts of the user's own are meant"""


def run_directory(name: str) -> str:
    """Returns the directory of a run: a path as it stands, a plain NAME below runs/ unless there is such a one."""
    plain = name and "/" not in name and name not in (".", "..") and not Path(name).is_dir()
    return f"{RUNS}/{name}" if plain else name


def expand(argv: Sequence[str], known: Collection[str], own: Collection[str]) -> list[str]:
    """Writes short names out, unless the command has an option of its own by that name or does not read the setting."""
    result: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument[2:].partition("=")
        key = SHORT.get(name, ("", ""))[0] if argument.startswith("--") else ""
        if key not in known or name in own:
            result.append(argument)
            continue
        values = [value] if equals else [following for following in [next(arguments, None)] if following is not None]
        if name == "run":
            values = [value if value.startswith("--") else run_directory(value) for value in values]
        result += [f"--{key}={values[0]}"] if equals else [f"--{key}", *values]
    return result


def given(argv: Sequence[str], sections: Collection[str]) -> frozenset[str]:
    """Returns the settings that a command line and its files set, by dotted key.

    Args:
      argv: with short names written out and --config FILE as paths or YAML.
    """
    found: set[str] = set()
    for position, argument in enumerate(argv):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        value = value if equals else next(iter(argv[position + 1 : position + 2]), "")
        if name == "config":
            found |= set(keys(_content(value)))
        elif name in sections:
            content = _content(value)
            found |= {f"{name}.{key}" for key in keys(content)} or {name}
        else:
            found.add(name)
    return frozenset(found)


def differing(config: Config) -> frozenset[str]:
    """Returns the settings that differ from their defaults, by dotted key."""
    default = Config()
    return frozenset(
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
        if getattr(getattr(config, section.name), field.name) != getattr(getattr(default, section.name), field.name)
    )


def fields(sections: Sequence[str]) -> dict[str, dataclasses.Field]:
    """Returns the fields of sections, and of the sections within them, by dotted key."""

    def of(kind: type, prefix: str) -> dict[str, dataclasses.Field]:
        result = {}
        for field in dataclasses.fields(kind):
            result[f"{prefix}.{field.name}"] = field
            if dataclasses.is_dataclass(field.default_factory):
                result |= of(field.default_factory, f"{prefix}.{field.name}")
        return result

    types: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    return {key: field for section in sections for key, field in of(types[section], section).items()}


def nearest(key: str, known: Collection[str]) -> str:
    """Returns the end of a sentence about an unknown name: the known one that is nearest."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        leaf = key.rpartition(".")[2]
        close = [k for k in sorted(known) if k.rpartition(".")[2] == leaf]
    return f"; did you mean {close[0]!r}?" if close else "; --help all lists the keys"


def _content(value: str) -> dict[str, Any]:
    """Returns the mapping of a file, or of a YAML text."""
    if "\n" not in value and Path(value).is_file():
        return read(Path(value))
    content = yaml.safe_load(value)
    return content if isinstance(content, dict) else {}
