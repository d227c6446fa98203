"""The base model that travels with the package: the weights of the world that the default settings make.

Training it takes most of the time of a first run, and its figures differ a little from machine to machine. Other seeds
and settings make another world, whose base model is trained where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from scir_jax.errors import InputError
from scir_jax.world.files import FORMAT, as_json
from scir_jax.world.spec import WorldSpec

DIRECTORY = Path(__file__).parent / "base"
WEIGHTS, RECORD = "model.safetensors", "base.json"


def description(spec: WorldSpec, training: dict[str, Any]) -> dict[str, Any]:
    """Returns all that decides what a base model is, as it reads back from JSON.

    Args:
      training: settings of its training by name.
    """
    return {"format": FORMAT, "spec": as_json(spec), "training": training}


def shipped(spec: WorldSpec, training: dict[str, Any], directory: Path = DIRECTORY) -> Path | None:
    """Finds the weights of a world's base model in the package.

    Args:
      training: as in `description`.
      directory: of the package's weights.

    Returns:
      The safetensors file, or None where the package holds those of another world.

    Raises:
      InputError: the file is not what was shipped.
    """
    path = directory / WEIGHTS
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if record["base"] != description(spec, training):
        return None
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
        raise InputError(f"{path} is missing or was changed; install the package again")
    return path


def keep(weights: Path, spec: WorldSpec, training: dict[str, Any], directory: Path = DIRECTORY) -> None:
    """Puts a base model's weights where `shipped` finds them.

    Args:
      weights: safetensors file.
      training: as in `description`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    record = {"base": description(spec, training), "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    shutil.copyfile(weights, directory / WEIGHTS)
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")
