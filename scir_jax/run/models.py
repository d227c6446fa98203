"""The parameters that a run computes with: from model directories and adapters, and from its own checkpoints."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from scir_jax.bucket.working import place
from scir_jax.config.names import run_directory
from scir_jax.config.schema import Config, LoraConfig
from scir_jax.engine import sampler
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.model import families, lora
from scir_jax.model.hf import adapters, weights
from scir_jax.run import hub
from scir_jax.run.directory import settings_of

KEPT = ("base", "sft")
"""models of another run that are kept by name, see run.start_from"""
ModelName = int | str
"""the number of a run's model, a name of KEPT, or a model directory or a name of the hub"""


class Parameters:
    """Reads the parameters of Hugging Face and PEFT directories straight into their shards."""

    def __init__(self, config: Config, programs: Programs):
        self._config = config
        self._programs = programs

    def of_directory(self, directory: Path, *, adapter: Path | None = None, inference: bool = False) -> Any:
        """Reads all parameters of a Hugging Face directory.

        Args:
          adapter: PEFT directory of the adapters; without one they are new and change nothing.
          inference: in the computation's dtype throughout, instead of float32 where trained.

        Raises:
          InputError: its shape is not this model's.
        """
        programs = self._programs
        abstract = programs.abstract_inference if inference else programs.abstract_trained
        return lora.join(self._adapters(adapter, abstract), self._stored(directory, abstract))

    def configured(self) -> Any:
        """Reads the configured model to compute with, its adapters (lora.adapter) included."""
        return self.of_directory(self._given_model, adapter=self._given_adapter, inference=True)

    def initial(self) -> Any:
        """Reads M0's trained parameters, float32."""
        if self._programs.model.lora is None:
            return self.of_directory(self._given_model)
        return self._adapters(self._given_adapter, self._programs.abstract_trained)

    @cached_property
    def frozen(self) -> Any:
        """The parameters that no training changes; loaded once."""
        if self._programs.model.lora is None:
            return {}
        return self._stored(self._given_model, self._programs.abstract_inference)

    @property
    def _given_model(self) -> Path:
        return hub.directory(self._config.model.path, "model.path")

    def release(self) -> None:
        """Lets the frozen parameters go; they are loaded again when they are asked for."""
        self.__dict__.pop("frozen", None)

    @property
    def _given_adapter(self) -> Path | None:
        name = self._config.lora.adapter
        return hub.directory(name, "lora.adapter") if name else None

    def _stored(self, directory: Path, abstract: Any) -> Any:
        """Reads the parameters of a Hugging Face directory, without adapters; trained ones as in `abstract`."""
        arch = families.read(weights.hf_config(directory), str(directory / "config.json"))
        if arch != self._programs.arch:
            raise InputError(f"{directory}: another architecture than {self._config.model.path}")
        _, params = weights.load(directory, self._programs.abstract_frozen if self._programs.model.lora else abstract)
        return params

    def _adapters(self, directory: Path | None, abstract: Any) -> Any:
        """Reads the adapters of a PEFT directory, or makes fresh ones."""
        model = self._programs.model
        if model.lora is None:
            return {}
        if directory is not None:
            return adapters.load(directory, model.arch, model.lora, abstract)

        def fresh(key):
            trained, _ = lora.split(model.init(key), model.lora)
            return jax.tree.map(lambda s, value: value.astype(s.dtype), abstract, trained)

        key = sampler.stream_key(self._config.run.seed, "init", 0)
        return jax.jit(fresh, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))(key)


class Models:
    """M0 (base), M1 (after SFT), ... loaded from their checkpoints, which hold the trained parameters; one at a time.

    With adapters all models share the frozen weights, which stay in memory: another model is another set of adapters.

    Attributes:
      store: the checkpoints.
      parameters: where M0 and the frozen weights come from.
    """

    def __init__(self, store: ModelStore, programs: Programs, parameters: Parameters):
        self.store = store
        self.parameters = parameters
        self._programs = programs
        self._loaded: tuple[ModelName, Any] | None = None

    def load(self, number: ModelName) -> Any:
        """Loads a model's parameters to compute with; the model loaded before is let go first."""
        if isinstance(number, str) and number not in KEPT:
            self._loaded = None
            self.parameters.release()
            return self.parameters.of_directory(hub.directory(number, "reference"), inference=True)
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None
            self._loaded = (number, self.store.load(number, self._programs.abstract_inference))
        return lora.join(self._loaded[1], self.parameters.frozen)

    def release(self) -> None:
        """Lets the loaded model go, so that another one has its place; frozen weights stay."""
        self._loaded = None

    def take(self, number: int) -> Any:
        """Loads M_number's trained parameters, float32, for a training step to consume (donate)."""
        loaded, self._loaded = self._loaded, None
        programs = self._programs
        if loaded is not None and loaded[0] == number and programs.abstract_inference == programs.abstract_trained:
            return loaded[1]
        del loaded
        return self.store.load(number, programs.abstract_trained)


def roles(config: Config, iteration: int) -> dict[str, ModelName]:
    """Returns the model in each role of iteration t (0: evaluation of M1 after SFT).

    "start" is M_t; "before" is M_{t-1}; "preference" is DPO's reference; "implicit" is the implicit reward's reference,
    which must lag M_t.
    """
    start = start_of(config)
    # M0 and M1 of a run that begins with a later model of another run are not that run's.
    fixed: dict[str, ModelName] = (
        {"sft": 1, "base": 0} if start is None or start[1] == 1 else {"sft": "sft", "base": "base"}
    )
    before = max(iteration - 1, 0)
    named: dict[str, ModelName] = {**fixed, "previous": before, "start": iteration}
    return {
        "start": iteration,
        "before": before,
        "preference": named.get(config.preference.reference, config.preference.reference),
        "implicit": named.get(config.implicit.reference, config.implicit.reference),
    }


def judge_before(config: Config, iteration: int) -> int:
    """Returns the number of the model before M_t that has learned to judge: M_{t-1}, or M1 itself for the M1 of SFT."""
    start = start_of(config)
    first = 1 if start is None or start[1] == 1 else 0
    return max(iteration - 1, first)


def start_of(config: Config) -> tuple[Path, int] | None:
    """Returns the run directory and the number of the model that run.start_from names, or None without one.

    Raises:
      InputError: it names M0.
    """
    if not config.run.start_from:
        return None
    directory, _, number = config.run.start_from.rpartition(":M")
    if not directory or not number.isdigit():
        directory, number = config.run.start_from, "1"
    if int(number) == 0:
        raise InputError(
            f"run.start_from {config.run.start_from}: M0 is the model before training; leave run.start_from out, and "
            "give that run's model"
        )
    return place(run_directory(directory)), int(number)


def copied(config: Config) -> dict[ModelName, ModelName]:
    """Returns the models that are copied from the run of run.start_from: name here -> name there.

    The start is M1 here and the model before it M0. What `sft` and `base` mean there is kept by name, where a reference
    of this run asks for it.
    """
    start = start_of(config)
    if start is None or start[1] == 1:
        return {} if start is None else {0: 0, 1: 1}
    directory, number = start
    recorded = directory / "config.yaml"
    kept: dict[ModelName, ModelName] = {"sft": 1, "base": 0}
    if recorded.is_file():
        other = start_of(settings_of(directory))
        if other is not None and other[1] != 1:
            kept = {name: name for name in KEPT}
    asked = {config.implicit.reference, config.preference.reference}
    return {0: number - 1, 1: number, **{name: kept[name] for name in KEPT if name in asked}}


def adapters_of(config: LoraConfig) -> lora.Lora | None:
    """Returns the adapters that the configuration asks for, or None.

    Raises:
      InputError: lora.rank is negative, or contradicts the PEFT directory.
    """
    if not config.adapter:
        if config.rank < 0:
            raise InputError(f"lora.rank must not be negative, not {config.rank}")
        if not config.rank:
            return None
        return lora.Lora(config.rank, config.alpha, config.targets, config.rslora, config.dropout)
    found = adapters.read_config(hub.directory(config.adapter, "lora.adapter"))
    if config.rank not in (0, found.rank):
        raise InputError(f"lora.rank is {config.rank}, but the adapter {config.adapter} has rank {found.rank}")
    return found
