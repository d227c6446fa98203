"""Everything that a run's stages share: model, tokenizer, encoder, data, and the compiled programs."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from scir_jax.config import Config, LoraConfig
from scir_jax.data.encode import Encoder, Shapes
from scir_jax.engine import mesh as meshes
from scir_jax.engine import sampler
from scir_jax.errors import InputError
from scir_jax.loop.computation import Computation, Facts, training_batches
from scir_jax.loop.inputs import Inputs
from scir_jax.model import adapters, lora, weights
from scir_jax.model.architecture import Architecture
from scir_jax.text.chat import Chat, load_tokenizer
from scir_jax.text.judge import compile_judge, load_template

Ids = tuple[int, ...]
POSITIVE = (
    "optimise.batch_size",
    "optimise.epochs",
    "optimizer.accumulate",
    "optimizer.max_skipped",
    "sample.responses",
    "sample.batch_size",
    "sample.prompts",
    "pairs.per_prompt",
    "text.max_prompt_tokens",
    "text.max_response_tokens",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluate.batch_size",
    "evaluate.samples",
)


def resolve(config: Config) -> Config:
    """Replaces {world} in paths by the world's directory. InputError where there is none."""
    world = config.world.directory

    def fill(value: Any, key: str) -> Any:
        if isinstance(value, tuple):
            return tuple(fill(v, key) for v in value)
        if isinstance(value, str) and "{world}" in value:
            if world is None:
                raise InputError(f"{key} is {value!r} but world.directory is not set; give a path")
            return value.replace("{world}", world)
        return value

    sections = {}
    for name in ("model", "lora", "data", "generative"):
        section = getattr(config, name)
        sections[name] = dataclasses.replace(
            section, **{f.name: fill(getattr(section, f.name), f"{name}.{f.name}") for f in dataclasses.fields(section)}
        )
    return dataclasses.replace(config, **sections)


def check(config: Config) -> None:
    """Refuses settings that contradict each other, before anything is loaded."""
    models, labels = config.rewards.models, config.preference.labels
    if not (config.preference.weight or config.consistency.weight or config.replay.weight):
        raise InputError(
            "preference.weight, consistency.weight and replay.weight are all 0: there is nothing to train on"
        )
    if not models or len(set(models)) != len(models):
        raise InputError(f"rewards.models must name reward models, each once: {list(models)}")
    if (
        labels in ("generative", "implicit", "likelihood")
        and labels not in models
        and config.preference.update == "frozen"
    ):
        raise InputError(f"preference.labels is {labels}, frozen: add {labels} to rewards.models")
    if labels == "cream" and config.data.pairs:
        raise InputError("preference.labels is cream, which ranks sampled responses; leave data.pairs out")
    if config.consistency.target == "consensus" or labels == "consensus":
        weights_ = {n: getattr(config.rewards, f"{n}_weight") for n in models}
        if not any(weights_.values()):
            raise InputError(f"the consensus of {', '.join(models)} has no weight; set rewards.{models[0]}_weight")
    check_positive(config)
    if config.run.iterations < 0:
        raise InputError(f"run.iterations must not be negative, not {config.run.iterations}")
    check_sampling(config)
    if config.sample.responses < 2 and not config.data.pairs and config.run.iterations:
        raise InputError("sample.responses must be at least 2: a pair needs two responses")
    micro = config.optimizer.accumulate
    for key, value in training_batches(config).items():
        if value % micro:
            raise InputError(f"{key}={value} does not divide into optimizer.accumulate={micro} micro-batches")


def check_positive(config: Config, *sections: str) -> None:
    """Refuses counts below 1 in the sections that a command reads (all by default)."""
    for key in POSITIVE:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if (not sections or section in sections) and value is not None and value < 1:
            raise InputError(f"{key} must be at least 1, not {value}")
    if (not sections or "generative" in sections) and not config.generative.templates:
        raise InputError("generative.templates is empty; name at least one judge template")


def check_sampling(config: Config) -> None:
    """Refuses settings of `sample` that mean nothing."""
    sample = config.sample
    if sample.temperature < 0 or not 0 < sample.top_p <= 1 or sample.top_k < 0:
        raise InputError("sample: temperature and top_k must not be negative, top_p must be in (0, 1]")


class Session(Computation):
    """A model with its tokenizer, encoder and data files, and its programs on a mesh. Takes a resolved Config."""

    def __init__(self, config: Config):
        directory = Path(config.model.path)
        self.hf_config = weights.hf_config(directory)
        arch = Architecture.from_hf_config(self.hf_config, str(directory / "config.json"))
        self.chat = Chat(
            load_tokenizer(directory),
            str(directory),
            stop_ids(directory, self.hf_config),
            config.text.chat_template_kwargs,
        )
        if self.chat.tokenizer.vocab_size and len(self.chat.tokenizer) > arch.vocab_size:
            raise InputError(
                f"{config.model.path}: the tokenizer has {len(self.chat.tokenizer)} tokens, the embedding "
                f"{arch.vocab_size} rows; use the tokenizer that belongs to the model"
            )
        self.templates = [load_template(name) for name in config.generative.templates]
        self.judges = [compile_judge(template, self.chat) for template in self.templates]
        self.encoder = Encoder(config, self.chat, self.judges, arch.max_positions)
        super().__init__(config, arch, meshes.make_mesh(config.mesh), adapters_of(config.lora))
        self.data = Inputs(config, self.encoder)

    @property
    def shapes(self) -> Shapes:
        """The static lengths, from all data files unless a command fixed them."""
        return self.data.shapes

    @cached_property
    def facts(self) -> Facts:
        return Facts(
            shapes=self.shapes,
            verdict_ids=tuple(judge.verdict_ids for judge in self.judges),
            continued=self.encoder.continued,
            stop_ids=self.chat.stop_ids,
            pad_id=self.chat.pad_id,
        )

    @cached_property
    def files(self) -> frozenset[str]:
        rows = {
            "ift": self.data.ift_rows,
            "eft": self.data.eft_rows,
            "heldout_prompts": self.data.heldout_prompts,
            "heldout_pairs": self.data.heldout_pairs,
        }
        return frozenset(key for key, found in rows.items() if found)

    # --- parameters -------------------------------------------------------------------------------------------------

    def import_params(self, directory: Path, *, adapter: Path | None = None, inference: bool = False):
        """All parameters of a Hugging Face directory, sharded. InputError if its shape is not this model's.

        Args:
          adapter: PEFT directory of the adapters; without one they are new and change nothing.
          inference: in the computation's dtype throughout, instead of float32 where trained.
        """
        abstract = self.abstract_inference if inference else self.abstract_trained
        return lora.join(self._adapters(adapter, abstract), self._stored(directory, abstract))

    def _stored(self, directory: Path, abstract):
        """The parameters of a Hugging Face directory, without adapters; those that are trained as in `abstract`."""
        arch = Architecture.from_hf_config(weights.hf_config(directory), str(directory / "config.json"))
        if arch != self.arch:
            raise InputError(f"{directory}: another architecture than {self.config.model.path}")
        _, params = weights.load(directory, self.abstract_frozen if self.model.lora else abstract)
        return params

    def inference_params(self):
        """The configured model's parameters to compute with, its adapters (lora.adapter) included."""
        adapter = self.config.lora.adapter
        return self.import_params(
            Path(self.config.model.path), adapter=Path(adapter) if adapter else None, inference=True
        )

    def initial_params(self):
        """M0's trained parameters, float32."""
        if self.model.lora is None:
            return self.import_params(Path(self.config.model.path))
        adapter = self.config.lora.adapter
        return self._adapters(Path(adapter) if adapter else None, self.abstract_trained)

    @cached_property
    def frozen(self):
        """The parameters that no training changes; loaded once."""
        if self.model.lora is None:
            return {}
        return self._stored(Path(self.config.model.path), self.abstract_inference)

    def _adapters(self, directory: Path | None, abstract):
        """The adapters of a PEFT directory, or fresh ones."""
        if self.model.lora is None:
            return {}
        if directory is not None:
            return adapters.load(directory, self.arch, self.model.lora, abstract)

        def fresh(key):
            trained, _ = lora.split(self.model.init(key), self.model.lora)
            return jax.tree.map(lambda s, value: value.astype(s.dtype), abstract, trained)

        key = sampler.stream_key(self.config.run.seed, "init", 0)
        return jax.jit(fresh, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))(key)


def adapters_of(config: LoraConfig) -> lora.Lora | None:
    """The adapters that the configuration asks for. InputError where it contradicts the PEFT directory."""
    if not config.adapter:
        if config.rank < 0:
            raise InputError(f"lora.rank must not be negative, not {config.rank}")
        if not config.rank:
            return None
        return lora.Lora(config.rank, config.alpha, config.targets, config.rslora, config.dropout)
    found = adapters.read_config(Path(config.adapter))
    if config.rank not in (0, found.rank):
        raise InputError(f"lora.rank is {config.rank}, but the adapter {config.adapter} has rank {found.rank}")
    return found


def stop_ids(directory: Path, hf_config: dict) -> Ids:
    """End-of-sequence ids of generation_config.json and config.json."""
    found: list[int] = []
    path = directory / "generation_config.json"
    configs = [json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    for content in (*configs, hf_config):
        value = content.get("eos_token_id")
        found += [value] if isinstance(value, int) else value or []
    return tuple(dict.fromkeys(found))
