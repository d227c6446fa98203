"""Command lines: typed options from the configuration's dataclasses, YAML files, one-sentence errors."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from scir_jax.config.files import find, keys, read
from scir_jax.config.schema import Config
from scir_jax.errors import InputError

QUICKSTART = "quickstart"

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    command: str,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    sections: Sequence[str] | None = None,
    options: dict[str, tuple[type, Any, str]] | None = None,
    default_config: str | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Reads the configuration and a command's own options from its command line.

    Args:
      sections: the sections of `Config` that the command reads; all by default. Others keep their defaults.
      options: name -> (type, default or ..., help) of options outside the configuration; `...` means required.
      default_config: the configuration used when no --config is given.

    Returns:
      The configuration, and the values of `options` by name.

    Raises:
      InputError: a file that is missing or not YAML, an unknown key (with the nearest known one), a wrong type.
    """
    options = options or {}
    flags = {f"--{name}" for name, (kind, _, _) in options.items() if kind is bool}
    argv = _with_values(list(sys.argv[1:] if argv is None else map(str, argv)), flags)
    types = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    names = list(sections or types)
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m scir_jax.{command}", description=description, exit_on_error=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file or name (quickstart, methods/srlm); may be repeated, later ones win",
    )
    for name, (kind, default, text) in options.items():
        if default is ...:
            parser.add_argument(f"--{name}", type=kind, required=True, help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name in names:
        parser.add_class_arguments(types[name], name)
    if default_config and "--config" not in argv and not any(a.startswith("--config=") for a in argv):
        argv = ["--config", default_config, *argv]
    known = _known_keys(names) | set(options)
    argv = _checked(argv, known, names)
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    except jsonargparse.ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from None
    config = Config(**{name: parsed[name] for name in names})
    for name in names:
        for field in dataclasses.fields(types[name]):
            default = getattr(types[name](), field.name)
            if getattr(parsed[name], field.name) is None and default is not None:
                raise InputError(f"{name}.{field.name} must not be null; leave it out for its default, {default!r}")
    return config, {name: parsed[name] for name in options}


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Writes settings as the command line that says the same.

    Args:
      settings: dotted keys or sections, {"run.seed": 1, "lora": {"rank": 8}}.

    Raises:
      InputError: a value is none that a configuration file could hold.
    """
    everything = [f.name for f in dataclasses.fields(Config)]
    sections = {*everything, *(key.rpartition(".")[0] for key in _known_keys(everything))}
    result: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and key in sections:
            result += arguments({f"{key}.{name}": inner for name, inner in value.items()})
        elif isinstance(value, (str, Path)):
            result.append(f"--{key}={value}")
        else:
            try:
                result.append(f"--{key}={json.dumps(value)}")
            except TypeError:
                raise InputError(f"{key}: a {type(value).__name__} is no value of a setting: {value!r}") from None
    return result


def distributed(config: Config, several: bool) -> Config:
    """Returns the configuration for one process of several, or for one alone."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, distributed=several))


def of_run(directory: Path, several: bool = False) -> Config:
    """Reads the configuration that a run directory records, with run.distributed as it is here.

    Args:
      several: whether this is one of several processes.

    Raises:
      InputError: the directory records none, or that of another version.
    """
    recorded = directory / "config.yaml"
    if not recorded.is_file():
        raise InputError(f"{directory}: not a run directory (no config.yaml)")
    return distributed(parse("train", "", ["--config", str(recorded)])[0], several)


def output_file(name: str) -> Path:
    """Checks the name of a file to be written, before any work is done for it.

    Raises:
      InputError: it is a directory, or the directory around it does not exist.
    """
    path = Path(name)
    if path.is_dir():
        raise InputError(f"--output {path}: is a directory, expected a file name")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: the directory {path.parent} does not exist")
    return path


def _with_values(argv: list[str], flags: set[str]) -> list[str]:
    """Gives the value true to a flag that stands alone."""
    result: list[str] = []
    for argument, following in zip(argv, [*argv[1:], "--"]):
        result.append(argument)
        if argument in flags and following.startswith("--"):
            result.append("true")
    return result


def _fields(sections: Sequence[str]) -> dict[str, dataclasses.Field]:
    """Returns the fields of sections, and of the sections within them, by dotted key."""

    def fields(kind: type, prefix: str) -> dict[str, dataclasses.Field]:
        result = {}
        for field in dataclasses.fields(kind):
            result[f"{prefix}.{field.name}"] = field
            if dataclasses.is_dataclass(field.default_factory):
                result |= fields(field.default_factory, f"{prefix}.{field.name}")
        return result

    types = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    return {key: field for section in sections for key, field in fields(types[section], section).items()}


def _known_keys(sections: Sequence[str]) -> set[str]:
    return set(_fields(sections))


def _checked(argv: list[str], known: set[str], sections: Sequence[str]) -> list[str]:
    """Refuses unknown keys of files and options with the nearest known key."""
    allowed = known | set(sections) | {"config", "help", "print_config"}
    everything = [f.name for f in dataclasses.fields(Config)]
    in_files = known | set(everything) | _known_keys(everything)
    # Keys of mappings are the user's own.
    mappings = {k for k, field in _fields(everything).items() if str(field.type).startswith("dict")}
    for position, argument in enumerate(argv):
        if not argument.startswith("--"):
            continue
        name, _, value = argument[2:].partition("=")
        if name == "config":
            file = find(value or (argv[position + 1] if position + 1 < len(argv) else ""))
            for key in keys(read(file)):
                if key not in in_files and key.rpartition(".")[0] not in mappings:
                    raise InputError(f"{file}: unknown key {key!r}{_nearest(key, known)}")
        elif name not in allowed:
            raise InputError(f"unknown option --{name}{_nearest(name, known)}")
    return _only_sections(argv, known | set(sections))


def _only_sections(argv: list[str], names: set[str]) -> list[str]:
    """Leaves out what a command does not read of a whole run's files, and sections without a value."""
    result: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config" or argument.startswith("--config="):
            file = find(argument.partition("=")[2] or next(arguments))
            content = read(file)
            kept = {k: v for k, v in content.items() if k in names and v is not None}
            if kept:
                result += ["--config", str(file) if kept == content else yaml.safe_dump(kept)]
        else:
            result.append(argument)
    return result


def _nearest(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        leaf = key.rpartition(".")[2]
        close = [k for k in sorted(known) if k.rpartition(".")[2] == leaf]
    return f"; did you mean {close[0]!r}?" if close else "; --help lists the keys"
