"""External rewards of answers: from a function of the user's, or from a reward model that the run's devices compute."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.batches import by_length
from scir_jax.data.encode import Encoder, Row, middle_cut
from scir_jax.data.jsonl import batched
from scir_jax.data.messages import Messages
from scir_jax.data.pairs import Prompt
from scir_jax.engine.hosts import hosts
from scir_jax.engine.mesh import local_rows, put_batch
from scir_jax.engine.program import Program
from scir_jax.engine.programs import Programs
from scir_jax.engine.reward import RewardPrograms, compiled_length
from scir_jax.errors import InputError
from scir_jax.model import families
from scir_jax.model.architecture import Architecture
from scir_jax.model.hf import weights
from scir_jax.run import costs, hub
from scir_jax.run.costs import Spend
from scir_jax.run.scoring import Advance, Item, check_finite, nothing, taken
from scir_jax.run.setup import stop_ids
from scir_jax.text.chat import Chat, load_tokenizer

LOOKED_AT = 32
"""prompts whose length in a reward model's tokens is counted before the run"""


class Scorer(Protocol):
    """Gives a reward to each answer."""

    def rewards(self, items: Sequence[Item], advance: Advance = nothing, spend: Spend = nothing) -> np.ndarray:
        """Returns the rewards [len(items)] float64 of answers, the higher the better.

        Args:
          advance: is told after each batch how many answers it held.
          spend: is told what that cost, where a model was asked.
        """

    def programs(self, prompts: Iterable[Prompt]) -> list[Program]:
        """Returns the programs that answers to these prompts will probably need, the largest ones."""


def open_scorer(config: Config, encoder: Encoder, programs: Programs) -> Scorer | None:
    """Opens what `pairs.scorer` names; None without one. No weights are loaded.

    Raises:
      InputError: it is neither a function that can be imported nor a reward model that can be used.
    """
    name = config.pairs.scorer
    if not name:
        return None
    if hub.is_function(name):
        return FunctionScorer(name, encoder, 2 * config.evaluate.batch_size)
    return ModelScorer(config, hub.directory(name, "pairs.scorer"), encoder, programs)


def label(rewards: tuple[float, float], *, soft: bool) -> float:
    """Returns the probability that the first answer is better: sigmoid(r1 - r2) (Bradley-Terry), or 1, 1/2 or 0."""
    margin = rewards[0] - rewards[1]
    return float(0.5 * (1 + (np.tanh(margin / 2) if soft else np.sign(margin))))


def user_function(name: str) -> Callable:
    """Imports a function by its name, module:function.

    Raises:
      InputError: it cannot be imported.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"pairs.scorer {name!r} cannot be imported (module:function): {error}") from None


class FunctionScorer:
    """A function (conversations, answers) -> rewards, called with lists of equal length on the first host."""

    def __init__(self, name: str, encoder: Encoder, batch: int):
        self._name, self._encoder, self._batch = name, encoder, batch
        self._function = user_function(name)

    def programs(self, prompts: Iterable[Prompt]) -> list[Program]:
        """Returns none."""
        return []

    def rewards(self, items: Sequence[Item], advance: Advance = nothing, spend: Spend = nothing) -> np.ndarray:
        """Asks the function, batch by batch.

        Raises:
          InputError: it fails, or does not give one finite number for each answer.
        """
        found: list[float] = []
        for part in batched(items, self._batch):
            found += hosts.decide(lambda: self._call(part))
            advance(len(part))
        return np.array(found, np.float64)

    def _call(self, part: Sequence[Item]) -> list[float]:
        conversations = [[dict(message) for message in prompt.messages] for prompt, _ in part]
        try:
            values = list(self._function(conversations, [self._encoder.shown(answer) for _, answer in part]))
            rewards = [float(value) for value in values]
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"pairs.scorer {self._name}: {type(error).__name__}: {error} ({at.filename}:{at.lineno})"
            ) from error
        if len(rewards) != len(part):
            raise InputError(f"pairs.scorer {self._name}: gave {len(rewards)} rewards for {len(part)} answers")
        for (prompt, _), reward in zip(part, rewards):
            if not np.isfinite(reward):
                raise InputError(f"pairs.scorer {self._name}: gave {reward} for an answer to the prompt {prompt.where}")
        return rewards


def read_reward_model(directory: Path, name: str) -> tuple[Architecture, Chat, int | None]:
    """Reads a reward model's directory but for its weights -> architecture, tokenizer, and the pad token's id.

    Args:
      name: what pairs.scorer says, for the error.

    Raises:
      InputError: the directory is missing, is no reward model's, or its tokenizer or chat template cannot be used.
    """
    if not directory.is_dir():
        raise InputError(f"pairs.scorer {name!r}: is neither module:function nor a directory of a reward model")
    hf_config = weights.hf_config(directory)
    arch = families.read(hf_config, str(directory / "config.json"), reward=True)
    chat = Chat(load_tokenizer(directory), str(directory), stop_ids(directory, hf_config))
    if len(chat.tokenizer) > arch.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has {len(chat.tokenizer)} tokens, the embedding {arch.vocab_size} "
            "rows; use the tokenizer that belongs to the reward model"
        )
    return arch, chat, hf_config.get("pad_token_id")


class ModelScorer:
    """A reward model with its own tokenizer and chat template, loaded while it is asked and let go afterwards."""

    def __init__(self, config: Config, directory: Path, encoder: Encoder, programs: Programs):
        """
        Raises:
          InputError: the directory is missing, is no reward model's, or its tokenizer or chat template cannot be used.
        """
        arch, self.chat, self._pad_id = read_reward_model(directory, config.pairs.scorer)
        self._directory, self._encoder = directory, encoder
        self._context = arch.max_positions
        self._answer_tokens = config.text.max_response_tokens
        try:
            self._programs = RewardPrograms.beside(programs, arch)
        except InputError as error:
            raise InputError(f"pairs.scorer {directory}: {error}") from None

    def programs(self, prompts: Iterable[Prompt]) -> list[Program]:
        """Returns the program for the longest prompt with the longest answer, if the reward model's are as long."""
        # Another tokenizer's longest prompt is among this one's, as near as makes no difference.
        longest_here = sorted(prompts, key=lambda prompt: prompt.tokens)[-LOOKED_AT:]
        longest = max((len(self._row(prompt.messages, "").ids) for prompt in longest_here), default=0)
        return [self._programs.program(compiled_length(longest + self._answer_tokens, self._context))]

    def row(self, item: Item) -> Row:
        """Returns the conversation with the answer as the reward model's own template writes it; its end is judged.

        A conversation that is too long for the model loses its middle.
        """
        prompt, answer = item
        return self._row(prompt.messages, self._encoder.shown(answer))

    def _row(self, messages: Messages, answer: str) -> Row:
        conversation = [*messages, {"role": "assistant", "content": answer}]
        ids = middle_cut(self.chat.flatten(self.chat.pieces(conversation, generation_prompt=False)), self._context)
        # A reward model was trained to be read at the last token that is not the pad token, even where that token ends
        # the conversation itself (AutoModelForSequenceClassification).
        last = max((place for place, i in enumerate(ids) if i != self._pad_id), default=0)
        return Row(ids[: last + 1], judged=True)

    def rewards(self, items: Sequence[Item], advance: Advance = nothing, spend: Spend = nothing) -> np.ndarray:
        """Computes the reward model's scores, batch by batch.

        Raises:
          InputError: the weights cannot be read, or give values that are not finite.
        """
        programs = self._programs
        rows = [self.row(item) for item in items]
        spend(costs.rewarded(self._programs.model.arch, [len(row.ids) for row in rows]))
        fits = [compiled_length(len(row.ids), self._context) for row in rows]
        lengths = sorted(set(fits))
        _, params = weights.load(self._directory, programs.abstract, reward=True)
        result = np.zeros(len(items), np.float64)
        for tokens, numbers in zip(lengths, by_length([(n,) for n in fits], [(n,) for n in lengths]), strict=True):
            group = programs.group(tokens)
            for part in batched(numbers, group.rows):
                mine = [rows[i] for i in taken(part, local_rows(programs.mesh, group.rows))]
                batch = put_batch(group.arrays(mine, self.chat.pad_id), programs.mesh)
                values = np.asarray(programs.scorer(params, batch))[: len(part)]
                check_finite(values, "rewards")
                result[part] = values
                advance(len(part))
        return result
