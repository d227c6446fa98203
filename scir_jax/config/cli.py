"""Command lines: typed options from the configuration's dataclasses, YAML files, one-sentence errors."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import yaml

from scir_jax.bucket.objects import shown
from scir_jax.bucket.outputs import output
from scir_jax.config import help, names
from scir_jax.config.files import find, keys, read
from scir_jax.config.schema import Config
from scir_jax.errors import InputError

QUICKSTART = "quickstart"
PAPER = "mistral-7b"
"""the settings that a model of the user's own begins with"""

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Line(NamedTuple):
    """What a command line says.

    Attributes:
      config: the configuration.
      options: the values of the command's own options by name.
      given: the settings that the line and its files set, by dotted key.
    """

    config: Config
    options: dict[str, Any]
    given: frozenset[str]


def parse(command: str, description: str, argv: Sequence[str] | None = None, **arguments) -> tuple[Config, dict]:
    """Reads a command line as `line` does -> the configuration, and the values of the command's own options by name."""
    return line(command, description, argv, **arguments)[:2]


def line(
    command: str,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    sections: Sequence[str] | None = None,
    options: Mapping[str, tuple[Any, Any, str]] | None = None,
    default_config: str | None = None,
) -> Line:
    """Reads the configuration and a command's own options from its command line.

    Args:
      sections: the sections of `Config` that the command reads; all by default. Others keep their defaults.
      options: name -> (type, default or ..., help) of options outside the configuration; `...` means required.
      default_config: the configuration used when no --config is given; where a model or prompts of the user's own are,
        it is the paper's instead.

    Raises:
      InputError: a file that is missing or not YAML, an unknown key (with the nearest known one), a wrong type.
    """
    options = options or {}
    types: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    sections = list(sections or types)
    fields = names.fields(sections)
    flags = {f"--{name}" for name, (kind, _, _) in options.items() if kind is bool} | {"--auto"}
    argv = _with_values(list(sys.argv[1:] if argv is None else map(str, argv)), flags)
    parser = _parser(command, description, tuple(sections), tuple(options.items()))
    _help(parser, description, argv, options, fields)
    if command in names.OF_MODELS and any(a.partition("=")[0] in ("--run", "--run.directory") for a in argv):
        raise InputError(
            f"{command} has no use for --run: it asks a model directory; a run's exported model is --model RUN/export"
        )
    argv = names.expand(argv, fields, options)
    configured = any(a == "--config" or a.startswith("--config=") for a in argv)
    own = any(a.removeprefix("--").partition("=")[0] in names.OWN for a in argv if a.startswith("--"))
    known = set(fields) | set(options)
    argv = _checked(argv, known, sections)
    given = names.given(argv, sections)
    if default_config and not configured:
        argv = [*_checked(["--config", PAPER if own else default_config], known, sections), *argv]
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    except jsonargparse.ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from None
    config = Config(**{name: parsed[name] for name in sections})
    for name in sections:
        for field in dataclasses.fields(types[name]):
            default = getattr(types[name](), field.name)
            if getattr(parsed[name], field.name) is None and default is not None:
                raise InputError(f"{name}.{field.name} must not be null; leave it out for its default, {default!r}")
    if own and not configured and "run" in sections and "run.auto" not in given:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, auto=True))
    return Line(config, {name: parsed[name] for name in options}, given)


@functools.cache
def _parser(
    command: str, description: str, sections: tuple[str, ...], options: tuple[tuple[str, tuple[Any, Any, str]], ...]
) -> jsonargparse.ArgumentParser:
    """Makes the parser of a command; reading the help out of the dataclasses takes long, and is done once."""
    types: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m scir_jax.{command}", description=description, exit_on_error=False
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file or name (quickstart, methods/srlm); may be repeated, later ones win",
    )
    for name, (kind, default, text) in options:
        if default is ...:
            parser.add_argument(f"--{name}", type=kind, required=True, help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name in sections:
        parser.add_class_arguments(types[name], name)
    return parser


def _help(
    parser: jsonargparse.ArgumentParser, description: str, argv: list[str], options: Mapping, fields: Collection[str]
) -> None:
    """Prints the help that the command line asks for, and ends the command."""
    place = next((i for i, argument in enumerate(argv) if argument in ("--help", "-h")), None)
    if place is None:
        return
    what = argv[place + 1] if place + 1 < len(argv) else ""
    if what == "all":
        print(parser.format_help())
    else:
        print(help.screen(parser, description, options, fields))
    raise SystemExit(0)


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Writes settings as the command line that says the same.

    Args:
      settings: dotted keys or sections, {"run.seed": 1, "lora": {"rank": 8}}.

    Raises:
      InputError: a value is none that a configuration file could hold.
    """
    everything = [f.name for f in dataclasses.fields(Config)]
    sections = {*everything, *(key.rpartition(".")[0] for key in names.fields(everything))}
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
    """Reads the configuration that a run directory records, with run.directory and run.distributed as they are here.

    Args:
      several: whether this is one of several processes.

    Raises:
      InputError: the directory records none, or that of another version.
    """
    recorded = directory / "config.yaml"
    if not recorded.is_file():
        raise InputError(f"{directory}: not a run directory (no config.yaml)")
    try:
        config = parse("train", "", ["--config", str(recorded)])[0]
    except InputError as error:
        raise InputError(
            f"{directory}: this version of scir_jax cannot read its settings ({error}); restore config.yaml, or use the "
            "version that wrote it"
        ) from None
    run = dataclasses.replace(config.run, directory=shown(directory), distributed=several)
    return dataclasses.replace(config, run=run)


def output_file(name: str) -> Path:
    """Checks the name of a file to be written, before any work is done for it.

    Raises:
      InputError: it is a directory, or the directory around it does not exist.
    """
    path = output(name)
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


def _checked(argv: list[str], known: set[str], sections: Sequence[str]) -> list[str]:
    """Refuses unknown keys of files and options with the nearest known key."""
    short = {name for name, (key, _) in names.SHORT.items() if key in known}
    allowed = known | set(sections) | {"config", "help", "print_config"}
    everything = [f.name for f in dataclasses.fields(Config)]
    in_files = known | set(everything) | set(names.fields(everything))
    # Keys of mappings are the user's own.
    found = names.fields(everything).items()
    mappings = tuple(f"{key}." for key, field in found if str(field.type).startswith("dict"))
    for position, argument in enumerate(argv):
        if not argument.startswith("--"):
            continue
        name, _, value = argument[2:].partition("=")
        if name == "config":
            file = find(value or (argv[position + 1] if position + 1 < len(argv) else ""))
            for key in keys(read(file)):
                if key not in in_files and not key.startswith(mappings):
                    raise InputError(f"{file}: unknown key {key!r}{names.nearest(key, known)}")
        elif name not in allowed:
            raise InputError(f"unknown option --{name}{names.nearest(name, known | short)}")
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
