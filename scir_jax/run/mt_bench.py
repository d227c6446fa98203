"""Answers to MT-Bench's questions, turn by turn, in its own format."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from scir_jax.config.schema import Config, GenerativeConfig
from scir_jax.data.messages import Messages
from scir_jax.run.loaded import Model
from scir_jax.run.setup import open_model


def with_room(config: Config, questions: Mapping[str, Sequence[str]]) -> Config:
    """Returns the configuration with a limit of prompts that holds all of a question's turns and the answers between."""
    _, encoder = open_model(dataclasses.replace(config, generative=GenerativeConfig(templates=())))
    longest = config.text.max_response_tokens
    needed = max(
        len(encoder.chat.prompt(_conversation(turns, [""] * (len(turns) - 1)))) + longest * (len(turns) - 1)
        for turns in questions.values()
    )
    room = max(min(needed, encoder.context - longest), 1)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, max_prompt_tokens=room))


def answers(model: Model, questions: Mapping[str, Sequence[str]], generator: str) -> list[dict[str, Any]]:
    """Samples answers to questions of several turns; each turn sees the answers before it.

    Args:
      model: its configuration says how many choices there are (sample.responses), and how they are sampled.
      questions: question_id -> the user's turns.
      generator: name of the model.

    Returns:
      One row per question: question_id, answer_id, model_id, choices (index, turns), tstamp.
    """
    choices = [(name, index) for name in questions for index in range(model.config.sample.responses)]
    said: dict[tuple[str, int], list[str]] = {choice: [] for choice in choices}
    for turn in range(max(map(len, questions.values()))):
        if turn == 0:
            rows = model.sample([_conversation(turns[:1], []) for turns in questions.values()])
            asked = choices
        else:
            asked = [choice for choice in choices if len(questions[choice[0]]) > turn]
            prompts = [_conversation(questions[name][: turn + 1], said[name, index]) for name, index in asked]
            rows = model.sample(prompts, responses=1, seed=model.config.run.seed + turn)
        for choice, row in zip(asked, rows, strict=True):
            said[choice].append(row["response"])
    return [
        {
            "question_id": int(name) if name.isdecimal() else name,
            "answer_id": hashlib.sha256(repr((generator, name, said[name, 0])).encode()).hexdigest()[:22],
            "model_id": generator,
            "choices": [{"index": index, "turns": said[name, index]} for index in range(model.config.sample.responses)],
            "tstamp": time.time(),
        }
        for name in questions
    ]


def _conversation(turns: Sequence[str], answered: Sequence[str]) -> Messages:
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answered, turns[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return messages
