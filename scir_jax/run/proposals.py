"""What is proposed where a setting is not given: pure functions of the model, the data's lengths and the device.

Each takes the facts, the configuration so far and the given keys, and returns settings with a reason in a few words.
A given setting stands, and what is proposed after it is proposed for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from scir_jax.config.checks import DIVIDED
from scir_jax.config.schema import Config
from scir_jax.data.encode import round_up
from scir_jax.engine.cost.flops import cache_bytes
from scir_jax.engine.cost.memory import GIB
from scir_jax.model.architecture import Architecture

JUDGES = ("evaluator", "standalone", "criteria")
"""judge templates, the first that the tokenizer and the context allow"""
RESPONSE = 512
"""tokens of an answer where no data tell"""
LEAST = 16
"""tokens of an answer at the least"""
HELD_OUT = 64
RANK = 16
ADAPTER_RATES = {"sft.learning_rate": 1e-4, "optimise.learning_rate": 2e-5}
SLOTS = {"cpu": 16}
BUSY = 4096
"""tokens of a micro-batch and device that keep an accelerator busy: more micro-batches only where rows are more"""
ROOM = {"cpu": 0.5}
"""share of the device's memory that is planned with: on a CPU other programs run too"""


class Proposal(NamedTuple):
    """A setting's value, and why."""

    value: Any
    reason: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """What proposals follow from.

    Attributes:
      arch: the model's architecture.
      backend: "cpu", "gpu" or "tpu".
      devices: their number.
      limit: bytes that programs may use on each.
      prompts: tokens of (a sample of) the prompts, with the chat template's.
      rows: rows of data.prompts.
      answers: tokens of (a sample of) the given answers.
      judges: judge template -> the tokens of its question without prompt and answers; only those that the tokenizer
        allows, all in the layout `standalone`.
      thinks: the chat template has the option `enable_thinking`.
    """

    arch: Architecture
    backend: str
    devices: int
    limit: int
    prompts: Sequence[int] = ()
    rows: int = 0
    answers: Sequence[int] = ()
    judges: dict[str, int] = dataclasses.field(default_factory=dict)
    thinks: bool = False


def propose(
    facts: Facts, config: Config, given: Collection[str], kinds: Collection[str], sections: Collection[str]
) -> tuple[Config, dict[str, Proposal]]:
    """Proposes what is not given.

    Args:
      kinds, sections: of PROPOSALS and of the configuration, those that the command has a use for.

    Returns:
      The configuration with the proposals in it, and the proposals by key.
    """
    found: dict[str, Proposal] = {}
    for kind, function in PROPOSALS.items():
        if kind not in kinds:
            continue
        for key, proposal in function(facts, config, given):
            if key not in given and key.partition(".")[0] in sections:
                found[key] = proposal
                config = with_value(config, key, proposal.value)
    return config, found


def with_value(config: Config, key: str, value: Any) -> Config:
    """Returns the configuration with one setting changed."""
    section, name = key.split(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


Found = Iterator[tuple[str, Proposal]]


def text(facts: Facts, config: Config, given: Collection[str]) -> Found:
    """Proposes the judge template, and the limits of prompts and responses that fit into the context with it."""
    if facts.thinks:
        yield "text.chat_template_kwargs", Proposal({"enable_thinking": False}, "the chat template can think")
    templates = [name for name in JUDGES if name in facts.judges]
    if not templates or not len(facts.prompts):
        return
    context = facts.arch.max_positions
    longest = int(max(facts.prompts))
    # A judge's question holds the prompt and both answers.
    name = next((n for n in templates if context - facts.judges[n] - 1 - longest >= 2 * 4 * LEAST), None)
    name = name or min(templates, key=facts.judges.get)
    yield "generative.templates", Proposal((name,), "the model has a chat template")
    fixed = max([facts.judges[name], *(facts.judges.get(n, 0) for n in config.generative.templates)])
    room = context - fixed - 1
    high = int(np.percentile(facts.prompts, 99, method="higher"))
    prompt = longest if longest <= 1.5 * high else high
    why = f"the longest prompt has {longest}" if prompt == longest else f"99 % of the prompts have up to {high}"
    most = max(room // 2, 1)
    if round_up(prompt) > most:
        why = f"{why}, but two answers must fit beside it"
    prompt = min(round_up(prompt), most)
    if "text.max_prompt_tokens" in given:
        prompt = config.text.max_prompt_tokens
    yield "text.max_prompt_tokens", Proposal(prompt, why)
    answer, why = RESPONSE, "no data have answers to count"
    if len(facts.answers):
        high = int(np.percentile(facts.answers, 99, method="higher"))
        answer, why = round_up(max(2 * high, 64)), f"twice what 99 % of the given answers have ({high})"
    fits = (room - prompt) // 2
    if fits < answer:
        answer, why = max(fits // 8 * 8 or fits, 1), f"a question to the judge holds two, of {context}"
    yield "text.max_response_tokens", Proposal(answer, why)


def method(facts: Facts, config: Config, given: Collection[str]) -> Found:
    """Proposes to leave out what there are no data for."""
    data = config.data
    if not data.ift and not data.eft and not config.run.start_from:
        yield "sft.epochs", Proposal(0.0, "no --ift and no --eft: M1 is the model itself")
    if not data.eft and not (data.ift and config.replay.ift_batch_size):
        yield "replay.weight", Proposal(0.0, "no --eft to replay")
    if not data.heldout_prompts and facts.rows >= 8:
        count = min(HELD_OUT, max(facts.rows // 10, 2))
        yield "data.holdout", Proposal(count, "no --heldout_prompts: kept from training")


def devices(facts: Facts, config: Config, given: Collection[str]) -> Found:
    """Proposes the mesh and the dtype of the computation."""
    if facts.backend != "cpu":
        yield "model.dtype", Proposal("bfloat16", f"what a {facts.backend.upper()} is fast in")
    else:
        yield "model.dtype", Proposal("float32", "what a CPU is fast in")
    if facts.devices == 1:
        return
    if facts.arch.hidden_size % facts.devices == 0:
        yield "mesh.data", Proposal(1, f"weights are split over {facts.devices} devices")
        yield "mesh.fsdp", Proposal(-1, f"weights are split over {facts.devices} devices")
    else:
        yield "mesh.data", Proposal(-1, f"{facts.devices} devices do not divide the hidden width")
        yield "mesh.fsdp", Proposal(1, f"{facts.devices} devices do not divide the hidden width")


def training(facts: Facts, config: Config, given: Collection[str]) -> Found:
    """Proposes full fine-tuning or adapters, rematerialisation and micro-batches: what fits, the fastest first."""
    ranks = [config.lora.rank] if "lora.rank" in given or config.lora.adapter else [0, RANK]
    remats = [config.model.remat] if "model.remat" in given else ["none", "full"]
    limit = config.text.max_response_tokens
    shorter = [] if "text.max_response_tokens" in given else [n for n in (limit // 2, limit // 4) if n >= 4 * LEAST]
    for answer in (limit, *shorter, limit):
        need = Need(facts, with_value(config, "text.max_response_tokens", answer))
        counts = [config.training.accumulate] if "training.accumulate" in given else need.divisors
        options = [(rank, remat, count) for rank in ranks for remat in remats for count in counts]
        fitting = [
            (rank, remat, count)
            for rank, remat, count in options
            # Adapters of a given directory are as small as others.
            if need.training(rank or (RANK if config.lora.adapter else 0), remat, count) <= need.room
            and (remat == remats[-1] or count == counts[0] or need.tokens(count) >= BUSY)
        ]
        if fitting:
            break
    rank, remat, count = (fitting or options[-1:])[0]
    if answer != limit:
        yield "text.max_response_tokens", Proposal(answer, f"a training step with {limit} does not fit")
    whole = need.training(0, remats[-1], counts[-1])
    if rank:
        why = f"full fine-tuning needs {_size(whole)} of {_size(need.room)}"
        yield "lora.rank", Proposal(rank, why)
        if "lora.rank" not in given:
            yield "lora.alpha", Proposal(2.0 * rank, "twice the rank")
            for key, rate in ADAPTER_RATES.items():
                yield key, Proposal(rate, "adapters want a higher one")
    elif not config.lora.adapter:
        yield "lora.rank", Proposal(0, "full fine-tuning fits")
    about = f"a step takes up to {_size(need.training(rank, remat, count))} of {_size(need.room)}"
    yield "model.remat", Proposal(remat, about)
    yield "training.accumulate", Proposal(count, about if fitting else "as many as there can be; perhaps too large")


def inference(facts: Facts, config: Config, given: Collection[str]) -> Found:
    """Proposes how many answers are sampled, and how many pairs are scored at once."""
    need = Need(facts, config)
    shards = need.shards
    sizes = [shards * 2**power for power in range(8) if shards * 2**power <= SLOTS.get(facts.backend, 64)] or [shards]
    if facts.rows:
        enough = -(-facts.rows // max(config.run.iterations, 1))
        sizes = [size for size in sizes if size < 2 * enough] or sizes[:1]
    size = max((size for size in sizes if need.sampling(size) <= need.room), default=sizes[0])
    answers = size * config.sample.responses
    yield "sample.batch_size", Proposal(size, f"{answers} answers at once take {_size(need.sampling(size))}")
    sizes = [shards * 2**power for power in range(6) if shards * 2**power <= 32] or [shards]
    size = max((size for size in sizes if need.scoring(size) <= need.room), default=sizes[0])
    yield "evaluate.batch_size", Proposal(size, f"pairs scored at once take {_size(need.scoring(size))}")


PROPOSALS = {"text": text, "method": method, "devices": devices, "training": training, "inference": inference}
"""The proposals by kind, in the order in which they follow from each other."""


class Need:
    """Estimates bytes per device, of rows that are all as long as the limits allow: rather too much than too little."""

    def __init__(self, facts: Facts, config: Config):
        self.facts, self.config = facts, config
        arch = facts.arch
        self.item = 2 if config.model.dtype == "bfloat16" else 4
        self.room = int(ROOM.get(facts.backend, 0.9) * facts.limit)
        self.shards = facts.devices if config.mesh.data in (-1, facts.devices) or config.mesh.fsdp != 1 else 1
        self.split = facts.devices if config.mesh.fsdp != 1 else 1
        prompt, answer = config.text.max_prompt_tokens, config.text.max_response_tokens
        fixed = max(facts.judges.values(), default=128)
        self.scored = min(prompt + answer, arch.max_positions)
        self.judged = min(fixed + prompt + 2 * answer, arch.max_positions)

    @property
    def divisors(self) -> list[int]:
        """Numbers of micro-batches that divide every batch, powers of two."""
        sizes = [getattr(getattr(self.config, section), name) for section, name in (k.split(".") for k in DIVIDED)]
        return [2**n for n in range(11) if all(size % (2**n * self.shards) == 0 for size in sizes)] or [1]

    def tokens(self, accumulate: int) -> int:
        """Counts the tokens of a micro-batch on one device."""
        config = self.config
        templates = max(len(config.generative.templates), 1)
        step = config.optimise.batch_size * 2 * (self.scored + templates * self.judged)
        if config.replay.weight:
            step += config.replay.eft_batch_size * 2 * self.judged + config.replay.ift_batch_size * self.scored
        step += config.judge.constructed_batch_size * self.judged
        sft = config.sft.ift_batch_size * self.scored + config.sft.eft_batch_size * 2 * self.judged
        return max(step, sft if config.sft.epochs else 0) // (accumulate * self.shards)

    def training(self, rank: int, remat: str, accumulate: int) -> int:
        """Estimates a training step: weights, gradients, the optimiser's state, and what the backward pass keeps."""
        arch = self.facts.arch
        count = arch.parameter_count()
        moments = {"adamw": 8, "muon": 4, "adafactor": 0}[self.config.training.optimizer]
        if rank:
            trained = arch.num_layers * rank * (9 * arch.hidden_size + 3 * arch.intermediate_size)
            state = self.item * count + (8 + moments) * trained
        else:
            state = (8 + moments) * count
        kept = arch.hidden_size if remat == "full" else KEPT * self._layer
        tokens = self.tokens(accumulate)
        activations = tokens * (arch.num_layers * kept * self.item + 4 * self._layer * 4)
        return int(state / self.split + activations) + LOGITS

    def sampling(self, size: int) -> int:
        """Estimates the sampler with slots for the answers to so many prompts."""
        arch, config = self.facts.arch, self.config
        slots = size * max(config.sample.responses, 1)
        cache = cache_bytes(arch, slots, self.scored, self.item, batch_shards=self.shards)
        prompts = size * config.text.max_prompt_tokens // self.shards
        return int(self._weights + 1.5 * cache + 3 * prompts * self._layer * self.item) + LOGITS

    def scoring(self, size: int) -> int:
        """Estimates the judge's questions about so many pairs, in both orders."""
        tokens = 2 * size * self.judged // self.shards
        return int(self._weights + 3 * tokens * self._layer * self.item) + LOGITS

    @property
    def _weights(self) -> float:
        return self.item * self.facts.arch.parameter_count() / self.split

    @property
    def _layer(self) -> int:
        """Counts the numbers per token that one layer keeps for the backward pass."""
        arch = self.facts.arch
        heads = 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim
        return 6 * arch.hidden_size + heads + 4 * arch.intermediate_size


KEPT = 4
"""how often a layer keeps its numbers without rematerialisation, in other dtypes and as factors of gradients: what
XLA's CPU compiler counts for the step of a Qwen 3 of 0.6 billion parameters"""
LOGITS = 3 * 64 * 2**20
"""bytes of a chunk of logits, its gradient and what becomes of it"""


def _size(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"
