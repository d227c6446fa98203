"""What the programs of a run take: the description of each batch, from configuration, model, mesh and data."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import Mesh

from scir_jax.config.schema import Config
from scir_jax.data.batches import SHORTEST, RowGroup, SlotSpec, row_lengths
from scir_jax.data.encode import Lengths, round_up
from scir_jax.data.packing import Packing, Shape, deal
from scir_jax.data.pipelines import Way
from scir_jax.data.reading import ReadSpec
from scir_jax.data.steps import PairSpec, TrainSpec
from scir_jax.engine import forward, sampler
from scir_jax.engine import mesh as meshes
from scir_jax.errors import InputError
from scir_jax.method import objective, rewards
from scir_jax.model.architecture import Architecture
from scir_jax.model.attention import backend_of, chosen
from scir_jax.model.cached import cache_places
from scir_jax.model.decoder import Model

LONG_BIN = 4096
"""tokens of a bin on accelerators, unless a row is longer: their attention computes a bin's pairs in parallel, and what
rows do not see of each other too where it is splash"""
UNBOUNDED_BIN = 2**20
CALL_BINS = 4
"""of a device in a large call of the scorer or the judge"""
SHORT_ROW = 32
"""tokens; in a bin there is room for the readings of rows that are no shorter in the mean"""
ADMISSIONS = 16
"""in which all slots are filled"""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the programs depend on beside configuration, architecture and mesh: from a run's data, or a plan's limits.

    Attributes:
      lengths: static lengths of rows.
      verdict_ids: of every judge template.
      continued: the first template continues the conversation (Encoder.continued).
      stop_ids, pad_id: of the tokenizer.
      point_ids: ids of the points of the pointwise judge, where it is asked.
      present: keys of `data` with rows in them, of "ift", "eft", "heldout_prompts" and "heldout_pairs".
    """

    lengths: Lengths
    verdict_ids: tuple[tuple[int, ...], ...]
    continued: bool
    stop_ids: tuple[int, ...]
    pad_id: int
    present: frozenset[str] = frozenset()
    point_ids: tuple[int, ...] = ()


class Descriptions:
    """Describes what each program of a configuration takes.

    Attributes:
      config, model, mesh, facts: what the descriptions follow from.
    """

    config: Config
    model: Model
    mesh: Mesh
    facts: Facts

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

    @property
    def slot_spec(self) -> SlotSpec:
        """Describes the sampler: slots for the answers to sample.batch_size prompts."""
        lengths, size, devices = self.facts.lengths, self.config.sample.batch_size, meshes.batch_shards(self.mesh)
        answers = max(self._answers, default=1)
        # Where all answers end at one look, as many prompts come in as there is room for; else a few at a time.
        part = 1 if lengths.answer <= sampler.SEGMENT else ADMISSIONS
        slots = size * answers // (2 if self._halved else 1)
        return SlotSpec(
            # As many for every device.
            slots=max(slots // devices, 1) * devices,
            prompts=devices * -(-size // (devices * part)),
            tokens=tuple(tokens for (tokens,) in row_lengths([lengths.prompt])),
            answer_tokens=lengths.answer,
            places=cache_places(lengths.prompt + lengths.answer),
            devices=devices,
        )

    _halved = False

    def halve_slots(self) -> bool:
        """Makes the sampler anew with half of its slots; False where it was done before or no device has two."""
        if self._halved or self.slot_spec.slots < 2 * meshes.batch_shards(self.mesh):
            return False
        self._halved = True
        self.__dict__.pop("sampler", None)
        return True

    @property
    def _answers(self) -> set[int]:
        """The numbers of answers to a prompt that are asked for."""
        config = self.config
        sampled = config.run.iterations and not config.data.pairs and not config.sample.command
        counts = {config.sample.responses} if sampled else set()
        if config.run.iterations and config.judge.constructed_batch_size:
            counts |= {1} if {"perturbed", "truncated"} & set(config.judge.constructions) else set()
        if "heldout_prompts" in self.facts.present:
            counts |= {config.evaluate.samples} | ({1} if config.evaluate.greedy else set())
        return counts

    @property
    def score_specs(self) -> tuple[ReadSpec, ...]:
        """Describes the calls of the scorer, from the smallest to the largest."""
        heads, answer = len(self.spans), self.facts.lengths.answer
        if self.way.segmented:
            bins, tokens = self._calls(self.facts.lengths.scored)
            room = _readings(tokens)
            return tuple(ReadSpec(number, tokens, tokens, room, heads=heads) for number in bins)
        lengths = row_lengths([self.facts.lengths.scored])
        rows = 2 * self.config.evaluate.batch_size
        return tuple(ReadSpec(rows, tokens, min(answer, tokens), 1, heads=heads) for (tokens,) in lengths)

    @property
    def judge_specs(self) -> tuple[ReadSpec, ...]:
        """Describes the calls of the judge likewise."""
        longest, choices = max(self.facts.lengths.judges, default=0), 2 * len(self.facts.lengths.judges)
        if not longest:
            return ()
        if self.way.segmented:
            bins, tokens = self._calls(longest)
            room = _readings(tokens)
            return tuple(ReadSpec(number, tokens, verdicts=room, choices=choices) for number in bins)
        rows = 2 * self.config.evaluate.batch_size
        return tuple(ReadSpec(rows, tokens, verdicts=1, choices=choices) for (tokens,) in row_lengths([longest]))

    def _calls(self, longest: int) -> tuple[list[int], int]:
        """Returns the numbers of bins of a small and a large call, and the tokens of a bin.

        A large call holds no more tokens than evaluate.batch_size pairs of the longest rows.
        """
        devices = meshes.batch_shards(self.mesh)
        room = max(2 * self.config.evaluate.batch_size // devices, 1) * longest
        tokens = max(longest, min(LONG_BIN, self.way.bin, room))
        return sorted({devices, devices * max(min(room // tokens, CALL_BINS), 1)}), tokens

    @property
    def rate_groups(self) -> tuple[RowGroup, ...]:
        """The rows of one call of the pointwise judge, for each compiled length; none where it is not asked."""
        rows, ids = (2 * self.config.evaluate.batch_size,), self.facts.point_ids
        lengths = row_lengths([self.facts.lengths.pointwise]) if ids else []
        return tuple(RowGroup(rows, tokens, verdict=True, verdicts=len(ids)) for (tokens,) in lengths)

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
            orders=1 if config.judge.orders == "one" else 2,
            cached=wanted.cached,
            frozen=tuple((name, rewards.columns(name, config)) for name in wanted.frozen),
            verdicts=self.verdicts if wanted.verdicts else 0,
            heads=len([name for name in wanted.fresh if name in forward.SPANS]),
        )
        lengths = self.facts.lengths
        targets = self._present(config.replay) if config.replay.weight else {}
        if config.judge.constructed_batch_size:
            targets = targets | {"constructed": config.judge.constructed_batch_size}
            lengths = dataclasses.replace(
                lengths,
                targets=lengths.targets | {"constructed": self._constructed_tokens},
                learned=lengths.learned | {"constructed": lengths.verdict},
            )
        return TrainSpec.of(pairs, targets, lengths, *self._cells)

    @property
    def _constructed_tokens(self) -> int:
        """The longest row of a constructed pair, a judge's question with its verdict; 0 where there are none."""
        if not self.config.judge.constructed_batch_size:
            return 0
        return min(round_up(max(self.facts.lengths.judges) + 1), self.arch.max_positions)

    @property
    def _cells(self) -> tuple[int, int]:
        """Devices that share a batch, and micro-batches."""
        return meshes.batch_shards(self.mesh), self.config.training.accumulate

    @cached_property
    def way(self) -> Way:
        """How the rows of training steps are packed."""
        config, lengths = self.config, self.facts.lengths
        longest = max((*lengths.judges, *lengths.targets.values(), lengths.scored, self._constructed_tokens))
        kind, separate = config.text.packing, self._attention(longest) == "cudnn"
        if kind == "auto":
            # Short rows would gain less than another compilation costs.
            kind = "off" if longest <= SHORTEST else "lengths" if separate else "bins"
        if kind != "bins":
            if config.text.share_prompts == "always":
                raise InputError(
                    f"text.share_prompts is always, but rows are packed the way {kind}; set text.packing to bins, or "
                    "text.share_prompts to auto"
                )
            return Way(kind)
        if separate and config.model.attention == "cudnn":
            raise InputError(
                "text.packing is bins, but model.attention is cudnn, which knows no segments; set text.packing to "
                "lengths or off, or model.attention to blocks"
            )
        # Attention in blocks skips what rows do not see of each other; a long bin costs a CPU nothing.
        most = UNBOUNDED_BIN if self.backend == "cpu" else max(LONG_BIN, longest)
        bin = config.text.bin_tokens or most
        return Way(kind, bin, self._share(min(bin, LONG_BIN)))

    def _share(self, tokens: int) -> str:
        """Says whether rows in bins of so many tokens share their beginnings, see scir_jax.data.pipelines.Way."""
        wanted = self.config.text.share_prompts
        implementation = self._attention(tokens, segmented=True)
        if wanted == "never" or implementation in ("blocks", "xla"):
            return wanted
        if wanted == "always":
            raise InputError(
                f"text.share_prompts is always, which {implementation} attention cannot; set it to auto, or "
                "model.attention to blocks"
            )
        return "never"

    def _present(self, section: Any) -> dict[str, int]:
        """Returns the batch sizes of a section's supervised parts that have rows."""
        sizes = {"ift": section.ift_batch_size, "eft": section.eft_batch_size}
        return {name: size for name, size in sizes.items() if name in self.facts.present}

    @property
    def spans(self) -> tuple[str, ...]:
        """What the scorer reads off an answer: its log-probability, and what the method's reward models need."""
        models = {*self.config.rewards.models, *objective.needs(self.config).start}
        wanted = {"logps"}.union(*(rewards.REWARDS[name].reads for name in models))
        return tuple(name for name in forward.SPANS if name in wanted)

    @property
    def judge_passes(self) -> int:
        """How often the judge's uncertainty is sampled with the adapters' dropout; 0 without dropout."""
        dropout = self.model.lora is not None and self.model.lora.dropout > 0
        return self.config.generative.passes if dropout else 0

    @property
    def verdicts(self) -> int:
        """Single verdicts of the judge on a pair: one for each pass, else one for each template and order."""
        return self.judge_passes or 2 * len(self.config.generative.templates)

    def flash(self, tokens: int) -> bool:
        """Checks whether the attention over rows of this many tokens skips masked pairs."""
        return self._attention(tokens) != "xla"

    def _attention(self, tokens: int, segmented: bool = False) -> str:
        """Returns the attention that computes rows of this many tokens."""
        return chosen(
            self.config.model.attention,
            self.backend,
            self.config.model.dtype,
            tokens=tokens,
            head_dim=self.arch.head_dim,
            cap=self.arch.attention_cap,
            segmented=segmented,
        )

    def _bound(self, spec: TrainSpec) -> Shape:
        """Returns the shape of a step whose rows are all the longest."""
        if not self.way.segmented:
            return spec.bound
        items = spec.longest
        cells = deal(items, spec.pairs.pairs if spec.pairs else 0, spec.devices, spec.micro).cells
        sizes = [[items[i][r] for i, r in cell] for cell in cells]
        # text.bin_tokens need not hold the longest rows that the limits allow, but those that there are.
        most = max(self.way.bin, *(group.tokens for group in spec.groups))
        return Packing.of("bins", [sizes], spec.bound, most).shapes[-1]


def _readings(tokens: int) -> int:
    """Returns how many rows of a bin of so many tokens can be read."""
    return max(tokens // SHORT_ROW, 2)
