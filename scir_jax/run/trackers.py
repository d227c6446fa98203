"""Weights & Biases and Trackio: two packages with the same few calls, imported where the run asks for them."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scir_jax.data.jsonl import read_json, write_json
from scir_jax.errors import InputError

IDENTITY = "tracker.json"
"""the file of a run that keeps the id under which it is logged, so that a resumed run goes on in the same place"""
PROJECT = "scir_jax"


class Tracker:
    """The log of a run in one of both packages."""

    def __init__(self, package: str, directory: Path, config: dict[str, Any]):
        """
        Args:
          package: "wandb" or "trackio".
          directory: of the run.
          config: the settings to show beside the run.

        Raises:
          InputError: the package is not installed.
        """
        try:
            self._module = importlib.import_module(package)
        except ImportError:
            raise InputError(
                f"run.{package} is true but {package} is not installed; pip install 'scir_jax[{package}]'"
            ) from None
        identity = _identity(directory)
        self._steps_apart = package == "trackio"
        if package == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            self._run = self._module.init(
                project=project, id=identity, name=directory.name, dir=str(directory), config=config, resume="allow"
            )
            # The steps of the package itself only grow; those behind a checkpoint are done again.
            self._run.define_metric("*", step_metric="step")
        else:
            project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{directory.name}-{identity}"
            self._run = self._module.init(project=project, name=name, config=config, resume="allow", embed=False)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Logs numbers by name."""
        if self._steps_apart:
            self._run.log(values, step=step)
        else:
            self._run.log({**values, "step": step})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Logs a table."""
        self.log({name: self._module.Table(columns=list(columns), data=[list(row) for row in rows])}, step)

    def finish(self) -> None:
        """Sends what is left and ends the log."""
        self._run.finish()


def _identity(directory: Path) -> str:
    """Returns the id of a run, made when it is first logged."""
    path = directory / IDENTITY
    if not path.exists():
        write_json(path, {"id": secrets.token_hex(4)})
    return read_json(path)["id"]
