"""The compiled programs of a run: each with its batch, its cost, and the part of its memory that is known beforehand.

A program is a jitted function whose abstract arguments come from the description of its batch (data.batches); FLOPs,
memory and a plan's figures follow from the same description.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scir_jax.config.checks import DIVIDED
from scir_jax.config.schema import Config
from scir_jax.data.batches import RowGroup
from scir_jax.data.packing import Shape
from scir_jax.data.reading import ReadSpec
from scir_jax.data.steps import TrainSpec
from scir_jax.engine import forward, losses, sampler
from scir_jax.engine import mesh as meshes
from scir_jax.engine.checkpoint import abstract_params
from scir_jax.engine.cost import flops, memory
from scir_jax.engine.cost.memory import Memory
from scir_jax.engine.descriptions import Descriptions, Facts
from scir_jax.engine.program import Program
from scir_jax.engine.trainer import Trainer
from scir_jax.errors import InputError
from scir_jax.method import objective
from scir_jax.model import decoder, lora
from scir_jax.model.architecture import Architecture
from scir_jax.model.attention import backend_of, refusal
from scir_jax.model.sharding import Layout


class Programs(Descriptions):
    """The model on its mesh and the programs that a configuration may call, each made when it is first asked for.

    Attributes:
      model, mesh, facts: what they are made of.
      abstract_trained: the trained parameters' shapes, float32.
      abstract_inference: the same in the dtype to compute with.
      abstract_frozen: shapes of the parameters that no training changes.
      needs: memory of the steps that are compiled, by stage and shape.
    """

    def __init__(self, config: Config, arch: Architecture, mesh: Mesh, adapters: lora.Lora | None, facts: Facts):
        """
        Args:
          config: resolved.

        Raises:
          InputError: the mesh does not divide the model or the batches, or the backend lacks the attention.
        """
        self.config = config
        self.mesh = mesh
        self.facts = facts
        meshes.check_model(mesh, arch)
        meshes.check_batches(mesh, batches(config))
        layout = Layout(mesh)
        reason = refusal(config.model.attention, backend_of(layout), config.model.dtype, arch.attention_cap)
        if reason:
            raise InputError(f"model.attention is {config.model.attention}, but {reason}; set it to auto or blocks")
        self.model = decoder.define(
            arch,
            compute_dtype=config.model.dtype,
            attention=config.model.attention,
            remat=config.model.remat,
            layout=layout,
            lora=adapters,
        )
        self.needs: dict[tuple[str, Shape], Memory] = {}
        self.abstract_trained, self.abstract_frozen = lora.split(abstract_params(self.model, mesh), adapters)
        # Computing does not need the float32 masters: every layer casts its weights anyway.
        self.abstract_inference = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, config.model.dtype, sharding=s.sharding), self.abstract_trained
        )

    # --- functions --------------------------------------------------------------------------------------------------

    @cached_property
    def sampler(self) -> sampler.Sampler:
        """The sampler's functions."""
        facts = self.facts
        return sampler.Sampler(self.model, self.mesh, self.slot_spec, stop_ids=facts.stop_ids, pad_id=facts.pad_id)

    @cached_property
    def scorer(self):
        """Jitted (params, BinRows of B bins) -> readings [B, K] of each bin's answers by name."""
        answer_tokens, spans, segmented = self.facts.lengths.answer, self.spans, self.way.segmented

        def score(params, rows):
            most = min(answer_tokens, rows.places.shape[1])
            return forward.score(self.model, params, rows, most, spans, segmented=segmented)

        return self._inference(score)

    @cached_property
    def judge(self):
        """Jitted (params, BinRows of B bins, key of the dropout or None) -> what forward.judge reads."""
        verdict_ids, segmented = self.facts.verdict_ids, self.way.segmented

        def judge(params, rows, key):
            return forward.judge(self.model, params, rows, verdict_ids, key, segmented=segmented)

        return self._inference(judge, meshes.replicated(self.mesh))

    @cached_property
    def rater(self):
        """Jitted (params, pointwise judge rows [B, ...]) -> forward.Rated."""
        ids = self.facts.point_ids
        return self._inference(lambda params, rows: forward.rate(self.model, params, rows, ids))

    def _inference(self, function, *more):
        shardings = (meshes.param_shardings(self.model, self.mesh), meshes.batch_sharding(self.mesh), *more)
        return jax.jit(function, in_shardings=shardings, out_shardings=meshes.replicated(self.mesh))

    @cached_property
    def sft(self) -> Trainer:
        """The trainer of SFT."""
        loss = losses.supervised(self.model, segmented=self.way.segmented)
        return Trainer(self.config.training, loss, self.model, self.mesh)

    @cached_property
    def optimise(self) -> Trainer:
        """The trainer of SCIR training."""
        verdict_ids, segmented = self.facts.verdict_ids, self.way.segmented
        loss = losses.scir(self.model, self.config, self.optimise_spec, verdict_ids, segmented=segmented)
        return Trainer(self.config.training, loss, self.model, self.mesh)

    # --- programs ---------------------------------------------------------------------------------------------------

    def all(self, *, longest: bool = False) -> list[Program]:
        """Returns the programs that a run of the configuration calls.

        Args:
          longest: of those for rows of several lengths only the one for the longest.
        """
        config, present = self.config, self.facts.present
        found = [*self.prefill_programs[-1 if longest else 0 :], self.decode_program()] if self._answers else []
        if config.run.iterations or "heldout_pairs" in present:
            found += self.score_programs[-1 if longest else 0 :]
        if "heldout_pairs" in present or (config.run.iterations and objective.needs(config).judged):
            found += self.judge_programs[-1 if longest else 0 :]
        if config.run.iterations or "heldout_pairs" in present:
            found += self.rate_programs[-1 if longest else 0 :]
        if config.sft.epochs and self.sft_spec.groups:
            found.append(self.sft_program())
        if config.run.iterations:
            found.append(self.optimise_program())
        return found

    @property
    def prefill_programs(self) -> list[Program]:
        """The admission of prompts into slots as a program for each length of prompts."""
        spec, found = self.slot_spec, []
        for tokens in spec.tokens:
            count = flops.inference(
                self.arch, [RowGroup((spec.prompts,), tokens)], lora=self.model.lora, flash=self.flash
            )
            arguments = (self._params, self.sampler.abstract, spec.abstract(tokens))
            name, known = f"prefill, {tokens} tokens", self._sampling_memory
            found.append(Program(name, "prefill", self.sampler.admit, arguments, count, known, spec.prompts * tokens))
        return found

    def decode_program(self, seen: int | None = None) -> Program:
        """Returns the next tokens of the answers in all slots as a program.

        Args:
          seen: places of the cache that a query sees in the mean; by default those before the middle of the longest
            answer behind the longest prompt.
        """
        spec, mesh = self.slot_spec, self.mesh.shape
        seen = seen or spec.tokens[-1] + spec.answer_tokens // 2
        steps = min(sampler.SEGMENT, spec.answer_tokens)
        step = flops.decode_bytes(
            self.arch,
            spec.slots,
            seen,
            jnp.dtype(self.config.model.dtype).itemsize,
            lora=self.model.lora,
            fsdp=mesh["fsdp"],
            tensor=mesh["tensor"],
            batch_shards=meshes.batch_shards(self.mesh),
        )
        return Program(
            f"decode, {spec.slots} slots",
            "decode",
            self.sampler.decode,
            (
                self._params,
                self.sampler.abstract,
                sampler.stream_key(0, "responses", 0),
                sampler.Sampling.of(1.0),
                np.int32(spec.slots),
            ),
            flops.decoding(self.arch, spec.slots, steps, seen, spec.places, lora=self.model.lora),
            self._sampling_memory,
            spec.slots * steps,
            step * steps,
        )

    @property
    def _sampling_memory(self) -> Memory:
        spec, shards = self.slot_spec, meshes.batch_shards(self.mesh)
        itemsize, tensor = jnp.dtype(self.config.model.dtype).itemsize, self.mesh.shape["tensor"]
        cached = flops.cache_bytes(self.arch, spec.slots, spec.places, itemsize, tensor=tensor, batch_shards=shards)
        return dataclasses.replace(self._weights, cache=cached)

    @property
    def score_programs(self) -> list[Program]:
        """The scorer as a program for each of its calls."""
        return [
            self._forward(f"score, {_size(spec)}", "score", self.scorer, (spec.abstract(),), [spec.group])
            for spec in self.score_specs
        ]

    @property
    def judge_programs(self) -> list[Program]:
        """The judge as a program for each of its calls."""
        return [
            self._forward(f"judge, {_size(spec)}", "judge", self.judge, (spec.abstract(), None), [spec.group])
            for spec in self.judge_specs
        ]

    @property
    def rate_programs(self) -> list[Program]:
        """The pointwise judge as a program for each length of rows."""
        return [
            self._forward(f"rate, {group.tokens} tokens", "rate", self.rater, (group.abstract(),), [group])
            for group in self.rate_groups
        ]

    def sft_program(self, shape: Shape | None = None) -> Program:
        """Returns the SFT step of a shape as a program; by default that which holds the longest rows."""
        return self._step("SFT step", "sft", self.sft, self.sft_spec, shape)

    def optimise_program(self, shape: Shape | None = None) -> Program:
        """Returns the step of SCIR training of a shape as a program; by default that which holds the longest rows."""
        return self._step("SCIR step", "optimise", self.optimise, self.optimise_spec, shape)

    @cached_property
    def _params(self):
        return lora.join(self.abstract_inference, self.abstract_frozen)

    @cached_property
    def _weights(self) -> Memory:
        return Memory(weights=memory.device_bytes(self._params))

    @cached_property
    def _beside(self) -> Memory:
        """The memory taken where answers are scored and pairs judged: with evaluate.every a training state too."""
        if not self.config.evaluate.every:
            return self._weights
        state = self.optimise.abstract_state()
        masters = 0 if self.abstract_inference == self.abstract_trained else memory.device_bytes(state.params)
        return Memory(weights=self._weights.weights + masters, optimiser=memory.device_bytes(state.opt_state))

    def _forward(self, name: str, stage: str, function: Any, arguments: tuple, groups) -> Program:
        count = flops.inference(self.arch, groups, lora=self.model.lora, flash=self.flash)
        tokens = sum(group.rows * group.tokens for group in groups)
        return Program(name, stage, function, (self._params, *arguments), count, self._beside, tokens)

    def _step(self, name: str, stage: str, trainer: Trainer, spec: TrainSpec, shape: Shape | None) -> Program:
        if shape is None:
            # All rows as long as they may be; packed, they fill as many bins.
            shape, groups = (self._bound(spec), spec.groups)
        else:
            name = f"{name}, {shape.tokens:,} tokens"
            groups = tuple(
                RowGroup((spec.cells * bins,), tokens, shape.scored // sum(n for n, _ in shape.groups))
                for bins, tokens in shape.groups
            )
        state, frozen = trainer.abstract_state(), self.abstract_frozen
        trained = memory.device_bytes(state.params)
        known = Memory(
            weights=trained + memory.device_bytes(frozen),
            optimiser=memory.device_bytes(state.opt_state),
            gradients=trained,
        )
        count = flops.training(
            self.arch,
            groups,
            lora=self.model.lora,
            remat=self.config.model.remat,
            accumulate=self.config.training.accumulate,
            repeated=trainer.loss.counts is None,
            flash=self.flash,
        )
        arguments = (state, frozen, spec.abstract(shape), np.float32(0), trainer.dropout_key(0, 0, 0))
        return Program(name, stage, trainer.step, arguments, count, known, spec.cells * shape.tokens)


def _size(spec: ReadSpec) -> str:
    """Names a call of the scorer or the judge by its rows' length, or by its bins."""
    return f"{spec.tokens} tokens" if spec.readings == 1 else f"{spec.bins} x {spec.tokens} tokens"


def batches(config: Config) -> dict[str, tuple[int, int]]:
    """Returns every batch size with the number of micro-batches that it is taken in, by key."""
    divided = ((key, key.split(".")) for key in DIVIDED)
    found = {
        key: (getattr(getattr(config, section), name), config.training.accumulate) for key, (section, name) in divided
    }
    found["sample.batch_size"] = (config.sample.batch_size, 1)
    found["evaluate.batch_size"] = (config.evaluate.batch_size, 1)
    return found
