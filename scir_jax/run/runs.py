"""A run to ask in Python: its table, its models, another evaluation."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scir_jax.bucket.working import place
from scir_jax.config.schema import Config
from scir_jax.data.jsonl import read_json, write_json
from scir_jax.engine import mesh as meshes
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.hosts import hosts
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.run import choice, command, console, evaluation, iteration
from scir_jax.run.costs import Account
from scir_jax.run.directory import RunDirectory, settings_of
from scir_jax.run.ledger import Ledger
from scir_jax.run.loaded import Model
from scir_jax.run.manifest import DATA, manifest
from scir_jax.run.metrics import NoMetrics
from scir_jax.run.models import Models, Parameters
from scir_jax.run.places import checkpoints_of
from scir_jax.run.setup import prepare, templates_of


class Run:
    """A run directory, finished or not.

    Attributes:
      directory: its path.
      config: its settings as they are recorded.
    """

    def __init__(self, directory: str | Path, *, distributed: bool = False):
        """
        Args:
          distributed: this is one of several processes, one per host.

        Raises:
          InputError: the directory is not a run's, or that of another version.
        """
        self.directory = place(directory)
        self.config = settings_of(self.directory, distributed)
        self._opened: dict[int, Model] = {}
        self._loaded: Models | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}: {', '.join(self.models) or 'no models yet'})"

    def _repr_html_(self) -> str:
        """Shows the table of models in a notebook."""
        text = console.table_text(self.rows, str(self.directory), self.marked) if self.rows else repr(self)
        return f'<pre style="line-height:normal">{html.escape(text)}</pre>'

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table of models: one row per evaluated model, M1 first."""
        found = sorted(self.directory.glob("iteration_*/evaluation.json"))
        return iteration.rows(RunDirectory(self.directory), len(found) - 1)

    @property
    def best(self) -> str | None:
        """The name of the model that a finished run exports (evaluate.select), else None."""
        return RunDirectory(self.directory).best

    @property
    def marked(self) -> str | None:
        """The name of the model that tables mark: the exported one, where it is not just the last."""
        return choice.marked(self.rows, self.best, self.config.evaluate.select)

    @property
    def report(self) -> Path | None:
        """The page of the run, None where there is none yet."""
        path = self.directory / "report.html"
        return path if path.is_file() else None

    @property
    def models(self) -> Mapping[str, Model]:
        """The run's models by name, M0 (before training) first. One at a time has its weights in memory."""
        for number in self._store.numbers():
            if number not in self._opened:
                self._opened[number] = self._model.with_parameters(partial(self._read, number))
        return MappingProxyType({f"M{number}": model for number, model in sorted(self._opened.items())})

    def evaluate(self, *, again: bool = False) -> list[dict[str, Any]]:
        """Returns the evaluations of the run's models.

        Args:
          again: evaluate all of them anew, on the devices that are here, and write the evaluations.

        Returns:
          One row per model, M1 first.

        Raises:
          InputError: there is nothing to evaluate yet, or another process uses the run.
        """
        if again:
            return self._evaluate()
        files = sorted(self.directory.glob("iteration_*/evaluation.json"))
        if not files:
            raise InputError(f"{self.directory}: no model is evaluated yet; run train on, or give --again true")
        return [read_json(file) for file in files]

    # --- helpers ----------------------------------------------------------------------------------------------------

    @cached_property
    def _store(self) -> ModelStore:
        return ModelStore(checkpoints_of(self.directory))

    @cached_property
    def _here(self) -> Config:
        """The settings to compute with, on the devices that are here."""
        return dataclasses.replace(self.config, mesh=meshes.fitting(self.config.mesh))

    @cached_property
    def _model(self) -> Model:
        RunDirectory(self.directory).keep_models(self.config)
        return Model(self._here, partial(self._read, 0))

    def _read(self, number: int, programs: Programs) -> Any:
        if self._loaded is None:
            RunDirectory(self.directory).check_models(self.config)
            self._loaded = Models(self._store, programs, Parameters(self._here, programs))
        return self._loaded.load(number)

    def _evaluate(self) -> list[dict[str, Any]]:
        command.join(self.config)
        config = self._here
        directory = RunDirectory(self.directory)
        try:
            hosts.decide(lambda: directory.open(config))
            directory.share()
            hosts.decide(lambda: directory.check_places(config, ("model.path", *DATA)))
            hosts.together(lambda: directory.keep_models(config))
            with console.Stopper() as stopper:
                encoder, inputs, programs, parameters = hosts.together(lambda: prepare(config))
                hosts.decide(lambda: directory.check_manifest(manifest(config, templates_of(encoder))))
                models = Models(ModelStore(directory.checkpoints), programs, parameters)
                grader = hosts.together(lambda: evaluation.load_grader(config.evaluate.grader))
                last = models.store.latest()
                if not last:
                    raise InputError(f"{self.directory}: no model beyond M0 to evaluate yet")
                needs = (config, encoder, inputs, programs, models, directory, NoMetrics(), grader, stopper)
                for t in range(last):
                    # What the run itself spent stays as it is.
                    evaluation.evaluate_model(*needs, t, Account())
                    if hosts.first():
                        Ledger(self.directory).record_stage("evaluate", t)
                if hosts.first() and (self.directory / "summary.json").exists():
                    # The model that was chosen before is the one that is exported.
                    path = self.directory / "summary.json"
                    write_json(path, read_json(path) | {"rows": iteration.rows(directory, config.run.iterations)})
                return hosts.decide(
                    lambda: [read_json(directory.iteration(t) / "evaluation.json") for t in range(last)]
                )
        finally:
            directory.close()
