"""The model on its mesh with the jitted programs of a run: all that can be compiled without weights or data."""

from __future__ import annotations

import abc
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from scir_jax.config import Config
from scir_jax.data.encode import Shapes
from scir_jax.engine import mesh as meshes
from scir_jax.engine import sampler, steps
from scir_jax.engine.checkpoint import abstract_params
from scir_jax.engine.flops import Flops, by_program
from scir_jax.errors import InputError
from scir_jax.model import decoder, lora
from scir_jax.model.architecture import Architecture
from scir_jax.model.attention import backend_of, refusal
from scir_jax.model.sharding import Layout


class Facts(NamedTuple):
    """What the programs depend on beside configuration, architecture and mesh.

    Attributes:
      shapes: static lengths.
      verdict_ids: of every judge template.
      continued: the first template continues the conversation: its rows are the response rows too.
      stop_ids, pad_id: of the tokenizer.
    """

    shapes: Shapes
    verdict_ids: tuple[tuple[int, int], ...]
    continued: bool
    stop_ids: tuple[int, ...]
    pad_id: int


class Computation(abc.ABC):
    """Takes a resolved Config. InputError where the mesh does not divide the model or the batches."""

    def __init__(self, config: Config, arch: Architecture, mesh: Mesh, adapters: lora.Lora | None):
        self.config = config
        self.arch = arch
        self.mesh = mesh
        meshes.check_model(mesh, arch)
        meshes.check_batches(mesh, batches(config))
        layout = Layout(mesh)
        reason = refusal(config.model.attention, backend_of(layout), config.model.dtype, arch.attention_cap)
        if reason:
            raise InputError(f"model.attention is {config.model.attention}, but {reason}; set it to auto or xla")
        self.model = decoder.define(
            arch,
            compute_dtype=config.model.dtype,
            attention=config.model.attention,
            remat=config.model.remat,
            layout=layout,
            lora=adapters,
        )
        self.abstract_params = abstract_params(self.model, mesh)
        self.abstract_trained, self.abstract_frozen = lora.split(self.abstract_params, adapters)
        # To compute with, the float32 masters are not needed: every layer casts its weights anyway.
        self.abstract_inference = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, config.model.dtype, sharding=s.sharding), self.abstract_trained
        )

    @property
    @abc.abstractmethod
    def facts(self) -> Facts:
        """Of a run's tokenizer and data, or of a plan's limits."""

    @property
    @abc.abstractmethod
    def files(self) -> frozenset[str]:
        """Keys of `data` with rows in them, of "ift", "eft", "heldout_prompts" and "heldout_pairs"."""

    def local_rows(self, size: int) -> np.ndarray:
        """The numbers of those rows of a batch that this host holds."""
        return meshes.local_rows(self.mesh, size)

    @cached_property
    def flops(self) -> dict[str, Flops]:
        """Of one call of each program, by the names of scir_jax.loop.programs."""
        return by_program(
            self.config,
            self.arch,
            self.facts.shapes,
            continued=self.facts.continued,
            ift="ift" in self.files,
            eft="eft" in self.files,
            lora=self.model.lora,
            flash=backend_of(self.model.layout) == "tpu" and self.config.model.attention in ("auto", "splash"),
        )

    @cached_property
    def trainer(self) -> steps.Trainer:
        return steps.Trainer(
            self.config,
            self.model,
            self.mesh,
            verdict_ids=self.facts.verdict_ids,
            continued=self.facts.continued,
            response_tokens=self.facts.shapes.response,
        )

    @cached_property
    def scorer(self):
        return steps.scorer(self.model, self.mesh, self.facts.shapes.response)

    @cached_property
    def judge(self):
        return steps.judge(self.model, self.mesh, self.facts.verdict_ids)

    @cached_property
    def _samplers(self) -> dict[int, Any]:
        return {}

    def sampler(self, responses: int):
        if responses not in self._samplers:
            self._samplers[responses] = sampler.sampler(
                self.model,
                self.mesh,
                responses=responses,
                response_tokens=self.facts.shapes.response,
                stop_ids=self.facts.stop_ids,
                pad_id=self.facts.pad_id,
            )
        return self._samplers[responses]


def training_batches(config: Config) -> dict[str, int]:
    """The batch sizes that micro-batches divide, by key."""
    return {
        "optimise.batch_size": config.optimise.batch_size,
        "sft.ift_batch_size": config.sft.ift_batch_size,
        "sft.eft_batch_size": config.sft.eft_batch_size,
        "replay.ift_batch_size": config.replay.ift_batch_size,
        "replay.eft_batch_size": config.replay.eft_batch_size,
    }


def batches(config: Config) -> dict[str, tuple[int, int]]:
    """Every batch size with the number of micro-batches that it is taken in, by key."""
    found = {key: (size, config.optimizer.accumulate) for key, size in training_batches(config).items()}
    found["sample.batch_size"] = (config.sample.batch_size, 1)
    found["evaluate.batch_size"] = (config.evaluate.batch_size, 1)
    return found
