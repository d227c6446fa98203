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
from scir_jax.data.batches import SHORTEST, PromptSpec, RowGroup, row_lengths
from scir_jax.data.encode import Lengths
from scir_jax.data.packing import Item, Packing, Shape
from scir_jax.data.pipelines import Way
from scir_jax.data.steps import PairSpec, TrainSpec
from scir_jax.engine import forward, losses, sampler
from scir_jax.engine import mesh as meshes
from scir_jax.engine.checkpoint import abstract_params
from scir_jax.engine.cost import flops, memory
from scir_jax.engine.cost.flops import Flops
from scir_jax.engine.cost.memory import Memory
from scir_jax.engine.trainer import Trainer
from scir_jax.errors import InputError
from scir_jax.method import objective, rewards
from scir_jax.model import decoder, lora
from scir_jax.model.architecture import Architecture
from scir_jax.model.attention import backend_of, chosen, refusal
from scir_jax.model.sharding import Layout


LONG_BIN = 4096
"""tokens of a bin on accelerators, unless a row is longer: their attention computes a bin's pairs in parallel, and what
rows do not see of each other too where it is splash"""
UNBOUNDED_BIN = 2**20


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the programs depend on beside configuration, architecture and mesh: from a run's data, or a plan's limits.

    Attributes:
      lengths: static lengths of rows.
      verdict_ids: of every judge template.
      continued: the first template continues the conversation (Encoder.continued).
      stop_ids, pad_id: of the tokenizer.
      present: keys of `data` with rows in them, of "ift", "eft", "heldout_prompts" and "heldout_pairs".
    """

    lengths: Lengths
    verdict_ids: tuple[tuple[int, int], ...]
    continued: bool
    stop_ids: tuple[int, ...]
    pad_id: int
    present: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
      name: shown to users.
      stage: what it is for: "sample", "score", "judge", "sft" or "optimise".
      function: jitted.
      arguments: abstract.
      flops: of one call over all devices.
      known: bytes per device that are known without compiling.
      tokens: token places of one call over all devices, padding included; of a sampler those of the prompts.
      streamed: bytes that each device reads from its memory in one call at the least; counted for samplers only.
    """

    name: str
    stage: str
    function: Any
    arguments: tuple
    flops: Flops
    known: Memory
    tokens: int
    streamed: int = 0

    def compile(self, mesh: Mesh) -> jax.stages.Compiled:
        """Compiles the program for a mesh, which may be one of other machines' devices.

        Calls on the run's own mesh find what was compiled.
        """
        # Abstract arguments get the shardings that the real ones have; otherwise the first call would compile again.
        sharding = meshes.batch_sharding(mesh)

        def place(leaf: Any) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            return leaf

        return self.function.lower(*jax.tree.map(place, self.arguments)).compile()


class Programs:
    """The model on its mesh and the programs that a configuration may call, each made when it is first asked for.

    Attributes:
      model, mesh, facts: what they are made of.
      abstract_trained: the trained parameters' shapes, float32.
      abstract_inference: the same in the dtype to compute with.
      abstract_frozen: shapes of the parameters that no training changes.
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
        self._samplers: dict[int, Any] = {}
        self.abstract_trained, self.abstract_frozen = lora.split(abstract_params(self.model, mesh), adapters)
        # Computing does not need the float32 masters: every layer casts its weights anyway.
        self.abstract_inference = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, config.model.dtype, sharding=s.sharding), self.abstract_trained
        )

    @property
    def arch(self) -> Architecture:
        return self.model.arch

    @property
    def backend(self) -> str:
        """What is compiled for: "cpu", "gpu" or "tpu"."""
        return backend_of(self.model.layout)

    def local_rows(self, size: int) -> np.ndarray:
        """Returns the numbers of those rows of a batch that this host holds."""
        return meshes.local_rows(self.mesh, size)

    # --- batches ----------------------------------------------------------------------------------------------------

    def prompt_spec(self, answers: int) -> PromptSpec:
        """Describes the sampler's batch for this number of answers to each prompt."""
        lengths = self.facts.lengths
        return PromptSpec(self.config.sample.batch_size, lengths.prompt, answers, lengths.answer)

    @property
    def score_groups(self) -> tuple[RowGroup, ...]:
        """The rows of one call of the scorer, for each compiled length from short to long."""
        rows, answer = (2 * self.config.evaluate.batch_size,), self.facts.lengths.answer
        return tuple(
            RowGroup(rows, tokens, min(answer, tokens), heads=len(self.spans))
            for (tokens,) in row_lengths([self.facts.lengths.scored])
        )

    @property
    def judge_groups(self) -> tuple[tuple[RowGroup, ...], ...]:
        """The rows of one call of the judge: for each compiled length those of every template."""
        leading = (self.config.evaluate.batch_size, 2)
        return tuple(
            tuple(RowGroup(leading, tokens, verdict=True) for tokens in lengths)
            for lengths in row_lengths(self.facts.lengths.judges)
        )

    @cached_property
    def sft_spec(self) -> TrainSpec:
        """The batch of an SFT step."""
        return TrainSpec.of(None, self._present(self.config.sft), self.facts.lengths, *self._cells)

    @cached_property
    def optimise_spec(self) -> TrainSpec:
        """The batch of a step of SCIR training; it has judge rows only where the step asks the judge."""
        config, wanted = self.config, objective.needs(self.config)
        pairs = PairSpec.of(
            config.optimise.batch_size,
            self.facts.lengths,
            judged=wanted.asks_judge,
            continued=self.facts.continued,
            cached=wanted.cached,
            frozen=tuple((name, rewards.columns(name, config)) for name in wanted.frozen),
            verdicts=self.verdicts if wanted.verdicts else 0,
            heads=len([name for name in wanted.fresh if name in forward.SPANS]),
        )
        replayed = self._present(config.replay) if config.replay.weight else {}
        return TrainSpec.of(pairs, replayed, self.facts.lengths, *self._cells)

    @property
    def _cells(self) -> tuple[int, int]:
        """Devices that share a batch, and micro-batches."""
        return meshes.batch_shards(self.mesh), self.config.training.accumulate

    @cached_property
    def way(self) -> Way:
        """How the rows of training steps are packed."""
        config, lengths = self.config, self.facts.lengths
        longest = max((*lengths.judges, *lengths.targets.values(), lengths.scored))
        kind, separate = config.text.packing, self._attention(longest) == "cudnn"
        if kind == "auto":
            # Short rows would gain less than another compilation costs.
            kind = "off" if longest <= SHORTEST else "lengths" if separate else "bins"
        if kind != "bins":
            return Way(kind)
        if separate and config.model.attention == "cudnn":
            raise InputError(
                "text.packing is bins, but model.attention is cudnn, which knows no segments; set text.packing to "
                "lengths or off, or model.attention to blocks"
            )
        # Attention in blocks skips what rows do not see of each other; a long bin costs a CPU nothing.
        most = UNBOUNDED_BIN if self.backend == "cpu" else max(LONG_BIN, longest)
        return Way(kind, config.text.bin_tokens or most)

    def _present(self, section: Any) -> dict[str, int]:
        """Returns the batch sizes of a section's supervised parts that have rows."""
        sizes = {"ift": section.ift_batch_size, "eft": section.eft_batch_size}
        return {name: size for name, size in sizes.items() if name in self.facts.present}

    # --- functions --------------------------------------------------------------------------------------------------

    def sampler(self, answers: int):
        """Returns the jitted sampler for this number of answers to each prompt, see engine.sampler."""
        if answers not in self._samplers:
            stop_ids, pad_id = self.facts.stop_ids, self.facts.pad_id
            spec = self.prompt_spec(answers)
            self._samplers[answers] = sampler.sampler(self.model, self.mesh, spec, stop_ids=stop_ids, pad_id=pad_id)
        return self._samplers[answers]

    @property
    def spans(self) -> tuple[str, ...]:
        """What the scorer reads off an answer: its log-probability, and what the method's reward models need."""
        models = {*self.config.rewards.models, *objective.needs(self.config).start}
        wanted = {"logps"}.union(*(rewards.REWARDS[name].reads for name in models))
        return tuple(name for name in forward.SPANS if name in wanted)

    @cached_property
    def scorer(self):
        """Jitted (params, Rows [B, ...]) -> readings [B] of each row's scored span by name."""
        answer_tokens, spans = self.facts.lengths.answer, self.spans

        def score(params, rows):
            return forward.score(self.model, params, rows, min(answer_tokens, rows.ids.shape[-1]), spans)

        return self._inference(score)

    @cached_property
    def judge(self):
        """Jitted (params, judge rows [P, 2, ...] of each template, key of the dropout or None) -> forward.Judged."""
        verdict_ids = self.facts.verdict_ids
        return self._inference(
            lambda params, rows, key: forward.judge(self.model, params, rows, verdict_ids, key),
            meshes.replicated(self.mesh),
        )

    @property
    def judge_passes(self) -> int:
        """How often the judge's uncertainty is sampled with the adapters' dropout; 0 without dropout."""
        dropout = self.model.lora is not None and self.model.lora.dropout > 0
        return self.config.generative.passes if dropout else 0

    @property
    def verdicts(self) -> int:
        """Single verdicts of the judge on a pair: one for each pass, else one for each template and order."""
        return self.judge_passes or 2 * len(self.config.generative.templates)

    def _inference(self, function, *more):
        shardings = (meshes.param_shardings(self.model, self.mesh), meshes.batch_sharding(self.mesh), *more)
        return jax.jit(function, in_shardings=shardings, out_shardings=meshes.replicated(self.mesh))

    @cached_property
    def sft(self) -> Trainer:
        """The trainer of SFT."""
        loss = losses.supervised(self.model, segmented=self.way.kind == "bins")
        return Trainer(self.config.training, loss, self.model, self.mesh)

    @cached_property
    def optimise(self) -> Trainer:
        """The trainer of SCIR training."""
        segmented = self.way.kind == "bins"
        loss = losses.scir(self.model, self.config, self.optimise_spec, self.facts.verdict_ids, segmented=segmented)
        return Trainer(self.config.training, loss, self.model, self.mesh)

    # --- programs ---------------------------------------------------------------------------------------------------

    def all(self, *, longest: bool = False) -> list[Program]:
        """Returns the programs that a run of the configuration calls.

        Args:
          longest: of those for rows of several lengths only the one for the longest.
        """
        config, present = self.config, self.facts.present
        counts = {config.sample.responses} if config.run.iterations and not config.data.pairs else set()
        if "heldout_prompts" in present:
            counts |= {config.evaluate.samples} | ({1} if config.evaluate.greedy else set())
        found = [self.sample_program(count) for count in sorted(counts)]
        if config.run.iterations or "heldout_pairs" in present:
            found += self.score_programs[-1 if longest else 0 :]
        if "heldout_pairs" in present or (config.run.iterations and objective.needs(config).judged):
            found += self.judge_programs[-1 if longest else 0 :]
        if config.sft.epochs and self.sft_spec.groups:
            found.append(self.sft_program())
        if config.run.iterations:
            found.append(self.optimise_program())
        return found

    def sample_program(self, answers: int) -> Program:
        """Returns the sampler as a program."""
        spec, arch, shards = self.prompt_spec(answers), self.arch, meshes.batch_shards(self.mesh)
        itemsize, mesh = jnp.dtype(self.config.model.dtype).itemsize, self.mesh.shape
        rows = spec.prompts * spec.answers
        cached = flops.cache_bytes(arch, rows, spec.places, itemsize, tensor=mesh["tensor"], batch_shards=shards)
        count = flops.sampling(
            arch, spec.prompts, spec.answers, spec.tokens, spec.answer_tokens, lora=self.model.lora, flash=self.flash
        )
        step = flops.decode_bytes(
            arch,
            rows,
            spec.tokens + spec.answer_tokens // 2,
            itemsize,
            lora=self.model.lora,
            fsdp=mesh["fsdp"],
            tensor=mesh["tensor"],
            batch_shards=shards,
        )
        return Program(
            sample_name(answers),
            "sample",
            self.sampler(answers),
            (self._params, spec.abstract(), sampler.stream_key(0, "responses", 0), sampler.Sampling.of(1.0)),
            count.total,
            dataclasses.replace(self._weights, cache=cached),
            spec.prompts * spec.tokens,
            step * spec.answer_tokens,
        )

    @property
    def score_programs(self) -> list[Program]:
        """The scorer as a program for each length of rows."""
        return [
            self._forward(f"score, {group.tokens} tokens", "score", self.scorer, (group.abstract(),), [group])
            for group in self.score_groups
        ]

    @property
    def judge_programs(self) -> list[Program]:
        """The judge as a program for each length of rows."""
        return [
            self._forward(
                f"judge, {max(group.tokens for group in groups)} tokens",
                "judge",
                self.judge,
                (tuple(group.abstract() for group in groups), None),
                groups,
            )
            for groups in self.judge_groups
        ]

    def sft_program(self, shape: Shape | None = None) -> Program:
        """Returns the SFT step of a shape as a program; by default that which holds the longest rows."""
        return self._step("SFT step", "sft", self.sft, self.sft_spec, shape)

    def optimise_program(self, shape: Shape | None = None) -> Program:
        """Returns the step of SCIR training of a shape as a program; by default that which holds the longest rows."""
        return self._step("SCIR step", "optimise", self.optimise, self.optimise_spec, shape)

    def flash(self, tokens: int) -> bool:
        """Checks whether the attention over rows of this many tokens skips masked pairs."""
        return self._attention(tokens) != "xla"

    def _attention(self, tokens: int) -> str:
        """Returns the attention that computes separate rows of this many tokens."""
        return chosen(
            self.config.model.attention,
            self.backend,
            self.config.model.dtype,
            tokens=tokens,
            head_dim=self.arch.head_dim,
            cap=self.arch.attention_cap,
        )

    @cached_property
    def _params(self):
        return lora.join(self.abstract_inference, self.abstract_frozen)

    @cached_property
    def _weights(self) -> Memory:
        return Memory(weights=memory.device_bytes(self._params))

    def _forward(self, name: str, stage: str, function: Any, arguments: tuple, groups) -> Program:
        count = flops.inference(self.arch, groups, lora=self.model.lora, flash=self.flash)
        tokens = sum(group.rows * group.tokens for group in groups)
        return Program(name, stage, function, (self._params, *arguments), count, self._weights, tokens)

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
            flash=self.flash,
        )
        arguments = (state, frozen, spec.abstract(shape), np.float32(0), trainer.dropout_key(0, 0, 0))
        return Program(name, stage, trainer.step, arguments, count, known, spec.cells * shape.tokens)

    def _bound(self, spec: TrainSpec) -> Shape:
        """Returns the shape of a step whose rows are all the longest."""
        if self.way.kind != "bins":
            return spec.bound
        items = [[Item(tuple((0, tokens) for bins, tokens in spec.bound.groups for _ in range(bins)), spec.bound.scored)]]
        return Packing.of("bins", [items], spec.bound, self.way.bin).shapes[-1]


def batches(config: Config) -> dict[str, tuple[int, int]]:
    """Returns every batch size with the number of micro-batches that it is taken in, by key."""
    divided = ((key, key.split(".")) for key in DIVIDED)
    found = {
        key: (getattr(getattr(config, section), name), config.training.accumulate) for key, (section, name) in divided
    }
    found["sample.batch_size"] = (config.sample.batch_size, 1)
    found["evaluate.batch_size"] = (config.evaluate.batch_size, 1)
    return found


def sample_name(answers: int) -> str:
    """Returns the name of the sampler for this number of answers to each prompt."""
    return f"sample {answers} per prompt"
