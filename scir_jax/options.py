"""Command lines: typed options from the configuration's dataclasses, YAML files, one-sentence errors."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from scir_jax import host_memory
from scir_jax.config import Config
from scir_jax.errors import InputError, Interrupted

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
QUICKSTART = Path("configs/quickstart.yaml")

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    command: str,
    description: str,
    argv: Sequence[str] | None = None,
    *,
    sections: Sequence[str] | None = None,
    options: dict[str, tuple[type, Any, str]] | None = None,
    default_config: Path | None = None,
) -> tuple[Config, dict[str, Any]]:
    """The configuration and a command's own options from its command line.

    Args:
      sections: the sections of `Config` that the command reads; all by default. Others keep their defaults.
      options: name -> (type, default or ..., help) of options outside the configuration; `...` means required.
      default_config: the YAML file used when no --config is given and it exists.

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
    parser.add_argument("--config", action="config", help="YAML file; may be repeated, later ones win")
    for name, (kind, default, text) in options.items():
        if default is ...:
            parser.add_argument(f"--{name}", type=kind, required=True, help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    for name in names:
        parser.add_class_arguments(types[name], name)
    if default_config and "--config" not in argv and not any(a.startswith("--config=") for a in argv):
        if default_config.exists():
            argv = ["--config", str(default_config), *argv]
        elif not argv:
            raise InputError(f"{default_config}: no such file; run from the project's directory or give --config FILE")
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


def join(config: Config) -> None:
    """Joins the other hosts of `run.distributed`, where that is set, before anything is computed.

    Raises:
      InputError: they cannot be reached, or have another configuration.
    """
    from scir_jax.engine import hosts
    from scir_jax.loop import console

    hosts.start(config.run.distributed)
    hosts.watch(config.run.host_timeout)
    console.only_first_host_speaks()
    hosts.same(to_dict(config), "configuration")


def distributed(config: Config, several: bool) -> Config:
    """The configuration for one process of several, or for one alone."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, distributed=several))


def of_run(directory: Path, several: bool = False) -> Config:
    """The configuration that a run directory records, `distributed` as it is here. InputError where there is none."""
    recorded = directory / "config.yaml"
    if not recorded.is_file():
        raise InputError(f"{directory}: not a run directory (no config.yaml)")
    return distributed(parse("train", "", ["--config", str(recorded)])[0], several)


def output_file(name: str) -> Path:
    """Checks a file to be written before any work is done for it."""
    path = Path(name)
    if path.is_dir():
        raise InputError(f"--output {path}: is a directory, expected a file name")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: the directory {path.parent} does not exist")
    return path


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as plain nested mappings, tuples as lists."""
    return yaml.safe_load(to_yaml(config))


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def main(run: Callable[[], int | None]) -> None:
    """Runs a command: the user's mistakes become one sentence on stderr and exit code 2, the disk's 3.

    Of several hosts all end when one does; 4 is the code of those that lost another one.
    """
    host_memory.keep()
    try:
        code = run() or 0
        _leave(None)
        sys.exit(code)
    except InputError as error:
        reason, code, message = error, 2, f"error: {error}"
    except Interrupted as stop:
        reason, code, message = stop, 128 + stop.signal, str(stop)
    except KeyboardInterrupt as stop:
        reason, code, message = stop, 130, "stopped"
    except Exception as error:
        # Orbax and TensorStore wrap the operating system's error in their own.
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        if not full and "No space left" not in str(error) and "File too large" not in str(error):
            _leave(error)
            raise
        reason, code, message = error, 3, f"error: {_disk_full(error)}"
    print(message, file=sys.stderr, flush=True)
    _leave(reason)
    sys.exit(code)


def _leave(error: BaseException | None) -> None:
    """Tells the other hosts of a run, if there are some, how this one ends."""
    if "scir_jax.engine.hosts" in sys.modules:  # else no run was begun, and JAX need not be imported for this
        from scir_jax.engine import hosts

        if error is not None and hosts.lost(error):
            hosts.stop(error)
        hosts.finish(error)


def _disk_full(error: Exception) -> str:
    where = getattr(error, "filename", None)
    return (
        f"no space left to write{f' {where}' if where else ''}; what was saved before is intact: "
        "free some space and run the same command again"
    )


def _with_values(argv: list[str], flags: set[str]) -> list[str]:
    """A flag that stands alone means true."""
    result: list[str] = []
    for argument, following in zip(argv, [*argv[1:], "--"]):
        result.append(argument)
        if argument in flags and following.startswith("--"):
            result.append("true")
    return result


def _fields(sections: Sequence[str]) -> dict[str, dataclasses.Field]:
    """The fields of sections, and of the sections within them, by dotted key."""

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
    mappings = {k for k, field in _fields(everything).items() if field.default_factory is dict}
    for position, argument in enumerate(argv):
        if not argument.startswith("--"):
            continue
        name, _, value = argument[2:].partition("=")
        if name == "config":
            file = Path(value or (argv[position + 1] if position + 1 < len(argv) else ""))
            for key in _file_keys(file):
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
            file = argument.partition("=")[2] or next(arguments)
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
            kept = {k: v for k, v in content.items() if k in names and v is not None}
            if kept:
                result += ["--config", file if kept == content else yaml.safe_dump(kept)]
        else:
            result.append(argument)
    return result


def _file_keys(file: Path) -> list[str]:
    if not file.is_file():
        raise InputError(f"--config {file}: no such file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a mapping of sections, found {type(content).__name__}")
    for section in dataclasses.fields(Config):
        values = content.get(section.name)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise InputError(f"{file}: {section.name!r} must be a mapping of keys, found {type(values).__name__}")
        for field in dataclasses.fields(section.default_factory):
            inner = values.get(field.name, {})
            if dataclasses.is_dataclass(field.default_factory) and not isinstance(inner, dict):
                name = f"{section.name}.{field.name}"
                raise InputError(f"{file}: {name!r} must be a mapping of keys, found {type(inner).__name__}")
    return _dotted(content)


def _dotted(content: dict) -> list[str]:
    """The keys of nested mappings, joined by dots."""
    keys: list[str] = []
    for name, value in content.items():
        keys += [f"{name}.{key}" for key in _dotted(value)] if isinstance(value, dict) and value else [str(name)]
    return keys


def _nearest(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        leaf = key.rpartition(".")[2]
        close = [k for k in sorted(known) if k.rpartition(".")[2] == leaf]
    return f"; did you mean {close[0]!r}?" if close else "; --help lists the keys"
