"""Configuration files: YAML of one mapping per section, found by path, or by name where they come with the package."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from scir_jax.config.schema import Config
from scir_jax.errors import InputError

BUNDLED = Path(__file__).parents[1] / "configs"
"""configurations that come with the package"""
STUDIES = "studies"
"""the directory in it of study files, which are no configurations"""


def find(name: str) -> Path:
    """Returns the file of a configuration: a path of the user's, or a name like "quickstart" or "methods/srlm".

    Raises:
      InputError: there is neither such a file nor a configuration of that name.
    """
    names = bundled_names()
    if path := _found(name, names):
        return path
    raise InputError(f"--config {name}: no such file, and no configuration of that name; there are {', '.join(names)}")


def find_study(name: str) -> Path:
    """Returns a study file: a path of the user's, or a name like "studies/quick".

    Raises:
      InputError: there is neither such a file nor a study of that name.
    """
    names = _bundled(studies=True)
    if path := _found(name, names):
        return path
    raise InputError(f"{name}: no such file, and no study of that name; there are {', '.join(names)}")


def bundled_names() -> list[str]:
    """Returns the names of the configurations that come with the package."""
    return _bundled(studies=False)


def _bundled(studies: bool) -> list[str]:
    names = sorted(path.relative_to(BUNDLED).with_suffix("").as_posix() for path in BUNDLED.rglob("*.yaml"))
    return [name for name in names if name.startswith(f"{STUDIES}/") == studies]


def _found(name: str, names: list[str]) -> Path | None:
    path = Path(name)
    if path.is_file():
        return path
    bundled = name.removesuffix(".yaml")
    return BUNDLED / f"{bundled}.yaml" if bundled in names else None


def read(file: Path) -> dict[str, Any]:
    """Reads the mapping of a configuration file.

    Raises:
      InputError: the file is not YAML, or a section is not a mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a mapping of sections, found {type(content).__name__}")
    for section in dataclasses.fields(Config):
        values = content.get(section.name)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise InputError(f"{file}: {section.name!r} must be a mapping of keys, found {type(values).__name__}")
        kind: Any = section.default_factory
        for field in dataclasses.fields(kind):
            inner = values.get(field.name, {})
            if dataclasses.is_dataclass(field.default_factory) and not isinstance(inner, dict):
                name = f"{section.name}.{field.name}"
                raise InputError(f"{file}: {name!r} must be a mapping of keys, found {type(inner).__name__}")
    return content


def keys(content: dict) -> list[str]:
    """Returns the keys of nested mappings, joined by dots."""
    found: list[str] = []
    for name, value in content.items():
        found += [f"{name}.{key}" for key in keys(value)] if isinstance(value, dict) and value else [str(name)]
    return found


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the configuration as plain nested mappings, tuples as lists."""
    return yaml.safe_load(to_yaml(config))


def to_yaml(config: Config) -> str:
    """Returns the configuration as a YAML text."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
