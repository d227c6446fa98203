"""A pair of answers to a prompt, tokenised once: the same object from the data file to the training step.

`to_row` writes a pair as a line of pairs.jsonl, `from_row` reads it back: ids are never made again from text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from scir_jax.data.messages import Messages, prompt_text
from scir_jax.data.records import external_label, need
from scir_jax.errors import InputError
from scir_jax.text.tokens import Ids

IDS = ("prompt_ids", "prompt_quote_ids", "response_a_ids", "quote_a_ids", "response_b_ids", "quote_b_ids")
"""keys of the lists of token ids in a row of pairs.jsonl"""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
      messages: the conversation that ends with a user's turn.
      ids: what is sampled from, up to the assistant's header.
      quote: ids of the plain text that a judge is shown.
      where: names the row that it came from.
      tokens: number of ids before the prompt lost its middle.
    """

    messages: Messages
    ids: Ids
    quote: Ids
    where: str = ""
    tokens: int = 0

    @property
    def cut(self) -> bool:
        return len(self.ids) < self.tokens


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
      text: as it was sampled or given, without the stop token.
      ids: as sampled, with the stop token unless the answer was cut.
      quote: ids of the plain text that a judge is shown.
      tokens: number of ids before they were cut.
    """

    text: str
    ids: Ids
    quote: Ids
    tokens: int = 0

    @property
    def cut(self) -> bool:
        return len(self.ids) < self.tokens


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, and what is known of them before training.

    Attributes:
      label: the probability that `a` is better, as the user or the pairing says; None where it is unknown.
      weight: of the pair in every term of the objective.
      cached: ROLE_READING -> its values for a and b: "implicit_logps" are log pi(y|x) in nats, summed over tokens,
        under the implicit reward's reference.
      frozen: reward model -> its logits at the start of the iteration, one per column (see method.rewards.REWARDS).
      verdicts: the judge's single verdicts at the start, logits in favour of `a`, each template in each order.
      length_penalty: alpha of the implicit reward r - alpha |y|.
    """

    prompt: Prompt
    a: Answer
    b: Answer
    label: float | None = None
    weight: float = 1.0
    cached: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    frozen: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    verdicts: tuple[float, ...] = ()
    length_penalty: float = 0.0

    @property
    def answers(self) -> tuple[Answer, Answer]:
        return self.a, self.b

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of both answers, with their stop tokens."""
        return len(self.a.ids), len(self.b.ids)

    def swapped(self) -> Pair:
        """Returns the pair with its answers exchanged; only for pairs of which nothing but the label is known yet."""
        label = None if self.label is None else 1 - self.label
        return dataclasses.replace(self, a=self.b, b=self.a, label=label)


def answer_row(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """Returns the part of a row of responses.jsonl that pairs are made of."""
    return {
        "prompt": prompt_text(prompt.messages),
        "messages": prompt.messages,
        "response": answer.text,
        "prompt_ids": list(prompt.ids),
        "prompt_quote_ids": list(prompt.quote),
        "response_ids": list(answer.ids),
        "quote_ids": list(answer.quote),
    }


def to_row(pair: Pair, number: int) -> dict[str, Any]:
    """Returns the row of pairs.jsonl of the pair with this number."""
    row: dict[str, Any] = {
        "pair": number,
        "prompt": prompt_text(pair.prompt.messages),
        "messages": pair.prompt.messages,
        "response_a": pair.a.text,
        "response_b": pair.b.text,
        "prompt_ids": list(pair.prompt.ids),
        "prompt_quote_ids": list(pair.prompt.quote),
    }
    for side, answer in zip("ab", pair.answers):
        row[f"response_{side}_ids"] = list(answer.ids)
        row[f"quote_{side}_ids"] = list(answer.quote)
        row[f"length_{side}"] = len(answer.ids)
    row["cached"] = {name: list(values) for name, values in pair.cached.items()}
    if pair.frozen:
        row["frozen_logits"] = {name: list(logits) for name, logits in pair.frozen.items()}
    if pair.verdicts:
        row["verdicts"] = list(pair.verdicts)
    if pair.label is not None:
        row["label"] = pair.label
    return {**row, "length_penalty": pair.length_penalty, "weight": pair.weight}


def from_row(row: Mapping[str, Any], where: str, labels: Sequence[str] = ("label",)) -> Pair:
    """Reads a pair from a row of pairs.jsonl.

    Args:
      row: as `to_row` writes it, perhaps with a label or another weight that the user added.
      where: names the row in errors.
      labels: names of the label's column; the first that the row has counts.

    Raises:
      InputError: a key is missing, a list does not hold token ids, or a value is not a number in its range.
    """
    ids = {key: token_ids(need(dict(row), key, where), f"{where}: {key}", 2**31) for key in IDS}
    a, b = [Answer(row.get(f"response_{y}", ""), ids[f"response_{y}_ids"], ids[f"quote_{y}_ids"]) for y in "ab"]
    return Pair(
        Prompt(row.get("messages", []), ids["prompt_ids"], ids["prompt_quote_ids"], where),
        a,
        b,
        label=external_label(dict(row), labels, where),
        weight=_number(row.get("weight", 1.0), f"{where}: weight"),
        cached=_numbers(row, "cached", where, 2),  # type: ignore[arg-type]
        frozen=_numbers(row, "frozen_logits", where),
        verdicts=_list([] if row.get("verdicts") is None else row["verdicts"], f"{where}: verdicts"),
        length_penalty=_number(row.get("length_penalty", 0.0), f"{where}: length_penalty"),
    )


def token_ids(value: Any, where: str, vocabulary: int) -> Ids:
    """Checks a list of token ids from a file, and returns it as a tuple.

    Args:
      where: names the row and the key in errors.
      vocabulary: number of ids, which are below it.

    Raises:
      InputError: the value is not a list of such ids.
    """
    ids = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    if not ids or not all(0 <= i < vocabulary for i in value):
        raise InputError(f"{where}: must be token ids from 0 to {vocabulary - 1}")
    return tuple(value)


def _is_number(value: Any) -> bool:
    """Checks whether a value is a number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3.4e38


def _number(value: Any, where: str) -> float:
    if not _is_number(value) or value < 0:
        raise InputError(f"{where}: must be a number of at least 0, not {value!r}")
    return float(value)


def _list(values: Any, where: str, count: int | None = None) -> tuple[float, ...]:
    """Reads a list of numbers, `count` where it is given."""
    if not (isinstance(values, list) and all(map(_is_number, values)) and count in (None, len(values))):
        raise InputError(f"{where}: must be a list of {count or 'finite'} numbers, not {values!r}")
    return tuple(map(float, values))


def _numbers(row: Mapping[str, Any], key: str, where: str, count: int | None = None) -> dict[str, tuple[float, ...]]:
    """Reads a mapping of names to lists of numbers, `count` each where it is given."""
    values = {} if row.get(key) is None else row[key]
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: {key}: must map names to lists of numbers, not {values!r}")
    return {name: _list(numbers, f"{where}: {key}.{name}", count) for name, numbers in values.items()}
