"""A model to ask in Python: what the commands sample and judge do, with rows in the place of files."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.bucket.objects import Folder, in_bucket
from scir_jax.bucket.working import place
from scir_jax.config import cli
from scir_jax.config.checks import check_positive, check_sampling, resolve
from scir_jax.config.schema import Config, DataConfig, GenerativeConfig
from scir_jax.data import records
from scir_jax.data.encode import Encoder, Lengths
from scir_jax.data.pairs import Answer, Prompt, token_ids
from scir_jax.engine import mesh as meshes
from scir_jax.engine.programs import Programs
from scir_jax.engine.sampler import stream_key
from scir_jax.errors import InputError
from scir_jax.model.architecture import Architecture
from scir_jax.run import console, judging, sampling, scoring
from scir_jax.run.directory import RunDirectory
from scir_jax.run.models import Parameters, adapters_of
from scir_jax.run.setup import facts_of, open_model

SECTIONS = ("run", "world", "model", "lora", "mesh", "data", "text", "sample", "generative", "implicit", "evaluate")
"""sections of the configuration that a loaded model reads"""
UNIT = 64
"""tokens"""


def load(directory: str | Path, **settings: Any) -> Model:
    """Opens a model directory, or the exported model of a run.

    Weights are read when they are first needed. Of a run its settings are taken too: its token limits, its judge
    templates, the dtype.

    Args:
      directory: a Hugging Face directory, or a run directory, of a disk or gs://BUCKET/PATH.
      settings: sections of the configuration, text=dict(max_response_tokens=64), or anything else that the command
        judge takes.

    Raises:
      InputError: the directory is not there or cannot be used, or a setting is unknown.
    """
    name, of_run = str(directory).rstrip("/"), []
    is_model = in_bucket(name) and Folder(name).read("manifest.json") is None
    run = Path(name) if is_model else place(name)
    if (run / "manifest.json").is_file() and (run / "config.yaml").is_file():
        RunDirectory(run).check_layout()
        if not (run / "export" / "config.json").is_file():
            raise InputError(f"{name}: the run has exported no model yet; scir_jax.Run({name!r}).models has its own")
        # Adapters are merged in the export.
        of_run = ["--config", str(run / "config.yaml"), "--lora.rank=0", "--lora.adapter=null"]
        name = f"{name}/export"
    argv = [*of_run, f"--model.path={name}", *cli.arguments(settings)]
    config = resolve(cli.parse("judge", "", argv, sections=SECTIONS)[0])
    if of_run:
        config = dataclasses.replace(config, mesh=meshes.fitting(config.mesh))
    return of_config(config)


def of_config(config: Config) -> Model:
    """Opens the model of a resolved configuration; weights are read when they are first needed."""
    found: list[Any] = []

    def read(programs: Programs) -> Any:
        if not found:
            found.append(Parameters(config, programs).configured())
        return found[0]

    return Model(config, read)


class Model:
    """A model with its tokenizer and judge templates. The programs that it needs are compiled once per length.

    Attributes:
      config: its settings.
    """

    def __init__(self, config: Config, read: Callable[[Programs], Any]):
        """
        Args:
          config: resolved.
          read: gives the parameters to compute with.

        Raises:
          InputError: a setting is out of its range.
        """
        check_positive(config, "text", "sample", "generative", "evaluate")
        check_sampling(config)
        self.config = dataclasses.replace(config, data=DataConfig(columns=config.data.columns))
        self._read = read
        self._programs: dict[str, Programs] = {}

    def with_parameters(self, read: Callable[[Programs], Any]) -> Model:
        """Returns a model with other parameters and the same compiled programs."""
        other = copy.copy(self)
        other._read = read
        return other

    def __repr__(self) -> str:
        return f"Model({self.config.model.path!r})"

    def sample(
        self,
        prompts: str | Sequence[str | Sequence[Mapping[str, str]]],
        *,
        responses: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> list[dict[str, Any]]:
        """Samples responses to prompts: the rows that the command sample writes.

        Args:
          prompts: one text, or several prompts, each a text or a list of messages that ends with a user's turn.
          responses: number of responses per prompt; this and the others are by default those of the configuration.
          temperature: 0 is greedy.
          top_p: nucleus.
          top_k: 0 is no limit.
          seed: the same seed gives the same responses.

        Returns:
          One row per response, prompt by prompt: prompt, response, response_ids, logprob (nats), stop ("eos" or
          "length"), prompt_number, sample and others.

        Raises:
          InputError: a prompt cannot be used, or a setting is out of its range.
        """
        asked: dict[str, Any] = dict(responses=responses, temperature=temperature, top_p=top_p, top_k=top_k)
        chosen = {name: value for name, value in asked.items() if value is not None}
        found = self._prompts([prompts] if isinstance(prompts, str) else list(prompts))
        config = dataclasses.replace(self.config, sample=dataclasses.replace(self.config.sample, **chosen))
        check_positive(config, "sample")
        check_sampling(config)
        encoder = self._plain[1]
        programs = self._programs_of(config, self._plain, encoder.lengths(found), prompts=len(found))
        count = config.sample.responses
        rows: list[dict[str, Any]] = []
        with console.stage("sample", len(found) * count) as bar:
            for finished in sampling.sample(
                encoder,
                programs,
                self._read(programs),
                list(enumerate(found)),
                responses=count,
                sampling=sampling.settings_of(config.sample),
                key=stream_key(config.run.seed if seed is None else seed, "responses", 0),
            ):
                rows += finished.rows
                bar.advance(by=finished.answers)
        return sorted(rows, key=lambda row: (row["prompt_number"], row["sample"]))

    def judge(
        self,
        pairs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        reference: Model | str | Path | None = None,
        with_ids: bool = False,
    ) -> list[dict[str, Any]]:
        """Asks both reward models about pairs: the rows that the command judge writes.

        Args:
          pairs: one or several mappings with prompt, response_a and response_b, or prompt, chosen and rejected.
          reference: of the implicit reward, a model or its directory; without one there is no p_implicit.
          with_ids: add the token ids of every judge row.

        Returns:
          The mappings with p_generative, the probability that the first answer is better, slot_bias and verdict_mass;
          with a reference also p_implicit, agreed, and the answers' log-probabilities, nats.

        Raises:
          InputError: a pair cannot be used, or the reference has another architecture.
        """
        rows = [dict(pair) for pair in ([pairs] if isinstance(pairs, Mapping) else pairs)]
        comparisons = records.read_comparisons(rows, self.config.data.columns)
        arch, encoder = self._judging
        found = []
        for comparison in comparisons:
            pair = encoder.pair(comparison)
            if pair is None:
                raise self._too_long(comparison.where)
            found.append(pair)
        lengths = encoder.lengths([pair.prompt for pair in found])
        programs = self._programs_of(self.config, (arch, encoder), lengths, pairs=len(found))
        with console.stage("judge", scoring.score_count(len(found), with_reference=reference is not None)) as bar:
            evidence = scoring.score_pairs(
                encoder,
                programs,
                found,
                config=self.config,
                model=lambda: self._read(programs),
                reference=None if reference is None else self._reference(reference, programs),
                advance=lambda by: bar.advance(by=by),
            )
        return judging.judged_rows(self.config, encoder, found, rows, evidence, with_ids=with_ids)

    def logprobs(
        self, prompt: str | Sequence[Mapping[str, str]], responses: Sequence[str | Sequence[int]]
    ) -> np.ndarray:
        """Computes log pi(response | prompt) of each response, summed over its tokens with the stop token.

        Args:
          prompt: a text, or a list of messages that ends with a user's turn.
          responses: texts, which get a stop token, or token ids as they were sampled ("response_ids" of `sample`).

        Returns:
          [len(responses)] float32, nats.

        Raises:
          InputError: the prompt or a response cannot be used, or is longer than the limits of the section text.
        """
        (found,) = self._prompts([prompt])
        if found.cut:
            raise self._too_long("the prompt")
        arch, encoder = self._plain
        answers = [self._answer(response, f"response {i}") for i, response in enumerate(responses, 1)]
        if not answers:
            return np.zeros(0, np.float32)
        programs = self._programs_of(self.config, self._plain, encoder.lengths([found]), pairs=-(-len(answers) // 2))
        items = [(found, answer) for answer in answers]
        return scoring.score_answers(encoder, programs, self._read(programs), items)["logps"]

    # --- helpers ----------------------------------------------------------------------------------------------------

    @cached_property
    def _plain(self) -> tuple[Architecture, Encoder]:
        """What samples and scores: no judge is asked, and the model need not have room for one."""
        return open_model(dataclasses.replace(self.config, generative=GenerativeConfig(templates=())))

    @cached_property
    def _judging(self) -> tuple[Architecture, Encoder]:
        return open_model(self.config)

    def _prompts(self, prompts: Sequence[Any]) -> list[Prompt]:
        encoder, result = self._plain[1], []
        for where, messages in records.read_prompts([{"prompt": prompt} for prompt in prompts]):
            if (prompt := encoder.prompt(messages, where)) is None:
                raise self._too_long(where)
            result.append(prompt)
        return result

    def _answer(self, response: Any, where: str) -> Answer:
        arch, encoder = self._plain
        if isinstance(response, str):
            answer = encoder.answer(response)
        else:
            answer = encoder.sampled(token_ids(list(response), where, arch.vocab_size))
        limit = self.config.text.max_response_tokens
        if not 0 < answer.tokens <= limit:
            raise InputError(
                f"{where} has {answer.tokens} tokens; text.max_response_tokens is {limit}: load it with more"
            )
        return answer

    def _too_long(self, where: str) -> InputError:
        limit = self.config.text.max_prompt_tokens
        return InputError(f"{where}: longer than text.max_prompt_tokens, which is {limit}; load the model with more")

    def _programs_of(
        self,
        config: Config,
        opened: tuple[Architecture, Encoder],
        lengths: Lengths,
        *,
        prompts: int = 0,
        pairs: int = 0,
    ) -> Programs:
        """Returns the programs for these lengths, with batches no larger than so many prompts or pairs need."""
        arch, encoder = opened
        mesh = meshes.make_mesh(config.mesh)
        size = dataclasses.replace
        sample = size(config.sample, batch_size=_batch(config.sample.batch_size, prompts, mesh))
        evaluate = size(config.evaluate, batch_size=_batch(config.evaluate.batch_size, pairs, mesh))
        config = size(config, sample=sample, evaluate=evaluate, run=size(config.run, iterations=1))
        lengths = _coarse(lengths, encoder.context)
        # Only what programs are made of: temperature and the others are arguments, a quote's length is told to none.
        key = repr((dataclasses.replace(lengths, quote=0), sample.batch_size, sample.responses, evaluate.batch_size))
        if key not in self._programs:
            facts = facts_of(encoder, lengths, frozenset())
            self._programs[key] = Programs(config, arch, mesh, adapters_of(config.lora), facts)
        return self._programs[key]

    def _reference(self, reference: Model | str | Path, programs: Programs) -> Callable[[], Any]:
        if not isinstance(reference, Model):
            return lambda: Parameters(self.config, programs).of_directory(Path(reference), inference=True)
        theirs, ours = reference._plain[0], self._plain[0]
        if theirs != ours or adapters_of(reference.config.lora) != adapters_of(self.config.lora):
            raise InputError(f"{reference}: has another architecture or other adapters than {self}")
        return lambda: reference._read(programs)


def _coarse(lengths: Lengths, context: int) -> Lengths:
    """Rounds lengths up to a multiple of UNIT, so that prompts of about a length share programs; same results."""

    def rounded(tokens: int, most: int) -> int:
        return max(tokens, min(-(-tokens // UNIT) * UNIT, most))

    return dataclasses.replace(
        lengths,
        prompt=rounded(lengths.prompt, context - lengths.answer),
        scored=rounded(lengths.scored, context),
        judges=tuple(rounded(tokens, context) for tokens in lengths.judges),
    )


def _batch(most: int, wanted: int, mesh: Any) -> int:
    """Returns a batch size for so many rows: a power of two per batch shard, and no more than `most`."""
    shards = meshes.batch_shards(mesh)
    needed = shards * 2 ** max(-(-wanted // shards) - 1, 0).bit_length()
    return min(needed, most) if wanted else most
