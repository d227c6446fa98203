"""Sizes of public models: the contents of their config.json, so that a plan needs no download."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from scir_jax.errors import InputError
from scir_jax.model.hf import weights

_DIRECTORY = Path(__file__).parent
# Parts of a name that tell models of one shape apart.
_VARIANTS = {"base", "chat", "hf", "instruct", "it", "meta", "pt"}


def names() -> list[str]:
    """Lists the models whose sizes are known here, as their repositories are called."""
    return sorted((path.stem for path in _DIRECTORY.glob("*.json")), key=str.lower)


def known(name: str) -> dict[str, Any]:
    """Reads the config.json of one of `names()`.

    Raises:
      KeyError: there is none of this name.
    """
    path = _DIRECTORY / f"{name}.json"
    if not path.is_file():
        raise KeyError(name)
    return json.loads(path.read_text(encoding="utf-8"))


def architecture(path: str) -> tuple[dict[str, Any], str]:
    """Reads the config.json of a model directory, or of the public model that the directory is named after.

    Case and the words that only tell variants of one shape apart (Instruct, chat, it, base, hf) do not matter.

    Returns:
      The configuration, and where it comes from, for messages.

    Raises:
      InputError: the directory has no config.json and no public model of its name is known, or it cannot be read.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        return weights.hf_config(Path(path)), str(file)
    base = Path(path).name.partition("@")[0]  # of a hub's name without its revision
    by_shape = {_shape(name): name for name in names()}
    found = by_shape.get(_shape(base))
    if found is None:
        raise InputError(
            f"model.path {path}: there is no config.json, and {base!r} is none of the models whose sizes are known "
            f"({', '.join(names())}); download the model's config.json into that directory, no other file is needed"
        )
    return known(found), f"the known sizes of {found}"


def _shape(name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[-_]", name.lower()) if part not in _VARIANTS)
