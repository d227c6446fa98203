"""What the rows of data files mean: prompts, conversations, pairs of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scir_jax.config.schema import ColumnsConfig
from scir_jax.data import sources
from scir_jax.data.messages import Messages, answer_text, check_messages, hh_messages, prompt_messages, short
from scir_jax.data.tally import Tally
from scir_jax.errors import InputError

COLUMNS = ColumnsConfig()


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt. `label` is the probability that `a` is better, None where unknown."""

    messages: Messages
    a: str
    b: str
    label: float | None
    where: str = ""


@dataclass(frozen=True)
class Choices:
    """Answers to a prompt, those that are right and those that are wrong.

    Attributes:
      several: whether the row lists its answers; else there is one of each.
      row: as it was read.
    """

    messages: Messages
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    several: bool
    row: dict[str, Any]
    where: str = ""


def read_prompts(
    source: str | Path | list, columns: ColumnsConfig = COLUMNS, tally: Tally | None = None
) -> list[tuple[str, Messages]]:
    """Reads prompts, conversations that end with a user's turn.

    Args:
      source: as in sources.rows: names a file, a directory or a data set, or is a list of rows.
      columns: names of columns in the files.
      tally: counts the rows, and decides on bad ones; by default the first bad one raises.

    Returns:
      (where, conversation) of each row.

    Raises:
      InputError: the source is missing or empty, or has bad rows that `tally` does not allow.
    """
    return _read(source, columns, tally, _prompt)


def read_conversations(
    source: str | Path | list, columns: ColumnsConfig = COLUMNS, tally: Tally | None = None
) -> list[tuple[str, Messages]]:
    """Reads conversations with at least one assistant's turn: `messages`, or `prompt` and `response`.

    Args:
      columns, tally: as in `read_prompts`.

    Returns:
      (where, conversation) of each row.

    Raises:
      InputError: as in `read_prompts`.
    """
    return _read(source, columns, tally, _conversation)


def read_comparisons(
    source: str | Path | list,
    columns: ColumnsConfig = COLUMNS,
    tally: Tally | None = None,
    *,
    need_label: bool = False,
) -> list[Comparison]:
    """Reads pairs: `prompt`, `response_a`, `response_b` with an optional label, or TRL's `chosen`, `rejected`.

    chosen/rejected are texts or lists of messages; without `prompt` the conversations' common beginning is the prompt.

    Args:
      columns, tally: as in `read_prompts`.
      need_label: refuse rows of which neither a label nor chosen/rejected says who is better.

    Raises:
      InputError: as in `read_prompts`.
    """
    return [c for c, _ in read_comparisons_with_rows(source, columns, tally, need_label=need_label)]


def read_comparisons_with_rows(
    source: str | Path | list, columns: ColumnsConfig = COLUMNS, tally: Tally | None = None, *, need_label: bool = False
) -> list[tuple[Comparison, dict[str, Any]]]:
    """Reads pairs as `read_comparisons` does, each with the row that it was read from."""

    def parse(row: dict, columns: ColumnsConfig, where: str) -> tuple[Comparison, dict[str, Any]]:
        return _comparison(row, columns, where, need_label), row

    return [item for _, item in _read(source, columns, tally, parse)]


def read_choices(
    source: str | Path | list, columns: ColumnsConfig = COLUMNS, tally: Tally | None = None
) -> list[Choices]:
    """Reads prompts with right and wrong answers: `prompt`, `chosen`, `rejected`, each an answer or a list of texts.

    Args:
      columns, tally: as in `read_prompts`.

    Raises:
      InputError: as in `read_prompts`.
    """
    return [choices for _, choices in _read(source, columns, tally, _choices)]


def _read(source, columns: ColumnsConfig, tally: Tally | None, parse) -> list[tuple[str, Any]]:
    tally = tally or Tally(str(source))
    result = []
    for where, row in sources.rows(source):
        tally.rows += 1
        with tally.row(where):
            if isinstance(row, InputError):
                raise row
            _refuse_tools(row, where)
            result.append((where, parse(row, columns, where)))
    if not tally.rows:
        raise InputError(f"{source}: the file has no rows")
    tally.check()
    return result


# --- rows -----------------------------------------------------------------------------------------------------------


def _prompt(row: dict, columns: ColumnsConfig, where: str) -> Messages:
    key = _find(row, columns.prompt)
    if key is None and "instruction" in row:
        return _alpaca_prompt(row, where)
    if key is None:
        raise _lacks(row, columns.prompt, where, "name the column of the prompts in data.columns.prompt")
    return prompt_messages(row[key], f"{where}: {key}")


def _conversation(row: dict, columns: ColumnsConfig, where: str) -> Messages:
    key = _find(row, columns.messages)
    if key is not None and (row[key] is not None or _find(row, columns.prompt) is None):
        messages = check_messages(row[key], f"{where}: {key}")
    elif _find(row, columns.prompt) is not None or "instruction" in row:
        prompt = _prompt(row, columns, where)
        names = columns.response if _find(row, columns.prompt) is not None else ("output",)
        key = _find(row, names)
        if key is None:
            raise _lacks(row, names, where)
        if any(isinstance(row.get(name), bool) for name in columns.label):
            raise InputError(f"{where}: is an unpaired preference row (an answer with a true/false label), {_UNPAIRED}")
        messages = [*prompt, {"role": "assistant", "content": answer_text(row[key], f"{where}: {key}")}]
    else:
        raise _lacks(row, columns.messages, where, "or give 'prompt' and 'response'")
    if not any(m["role"] == "assistant" for m in messages):
        raise InputError(f"{where}: the conversation has no assistant's turn to learn from")
    return messages


def _comparison(row: dict, columns: ColumnsConfig, where: str, need_label: bool) -> Comparison:
    answers = [_find(row, names) for names in (columns.response_a, columns.response_b)]
    if answers == [None, None]:
        return Comparison(*_chosen_rejected(row, columns, where), 1.0, where)
    messages = _prompt(row, columns, where)
    for key, names in zip(answers, (columns.response_a, columns.response_b)):
        if key is None:
            raise _lacks(row, names, where)
    a, b = (answer_text(row[key], f"{where}: {key}") for key in answers)
    label = external_label(row, columns.label, where)
    if need_label and label is None:
        raise InputError(
            f"{where}: lacks the label {columns.label[0]!r}: 1 where response_a is better, 0 where response_b is"
        )
    return Comparison(messages, a, b, label, where)


def _chosen_rejected(row: dict, columns: ColumnsConfig, where: str) -> tuple[Messages, str, str]:
    keys = [_find(row, names) for names in (columns.chosen, columns.rejected)]
    if keys == [None, None] and _find(row, columns.response) and _find(row, columns.label):
        raise InputError(f"{where}: is an unpaired preference row (one answer and its label), {_UNPAIRED}")
    for key, names in zip(keys, (columns.chosen, columns.rejected)):
        if key is None:
            raise _lacks(row, names, where)
    places = [f"{where}: {key}" for key in keys]
    sides = [row[key] for key in keys]
    if _find(row, columns.prompt) is not None or "instruction" in row:
        messages = _prompt(row, columns, where)
        texts = []
        for side, place in zip(sides, places):
            if isinstance(side, list) and len(side) > 1:  # the whole conversation
                checked = check_messages(side, place)
                if checked[:-1] != messages:
                    raise InputError(f"{place} does not begin with the prompt")
                side = checked[-1:]
            texts.append(answer_text(side, place))
        return messages, texts[0], texts[1]
    if all(isinstance(side, str) for side in sides):
        sides = [hh_messages(side) for side in sides]
    if not all(isinstance(side, list) for side in sides):
        raise _lacks(
            row,
            columns.prompt,
            where,
            "it may be left out where chosen and rejected are messages, or texts of turns '\\n\\nHuman: ' and "
            "'\\n\\nAssistant: '",
        )
    chosen, rejected = (check_messages(side, place, ordered=False) for side, place in zip(sides, places))
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise InputError(f"{where}: chosen and rejected must share all messages but the last")
    messages = prompt_messages(chosen[:-1], places[0])
    return messages, answer_text(chosen[-1:], places[0]), answer_text(rejected[-1:], places[1])


def _choices(row: dict, columns: ColumnsConfig, where: str) -> Choices:
    keys = [_find(row, names) for names in (columns.chosen, columns.rejected)]
    sides = [None if key is None else row[key] for key in keys]
    if not any(isinstance(side, list) and side and isinstance(side[0], str) for side in sides):
        messages, right, wrong = _chosen_rejected(row, columns, where)
        return Choices(messages, (right,), (wrong,), False, row, where)
    for key, side in zip(keys, sides):
        if not isinstance(side, list) or not side or not all(isinstance(text, str) for text in side):
            raise InputError(f"{where}: {key}: expected a list of texts, as the other side is one")
    texts = [
        tuple(answer_text(text, f"{where}: {key}[{i}]") for i, text in enumerate(side))
        for key, side in zip(keys, sides)
    ]
    return Choices(_prompt(row, columns, where), texts[0], texts[1], True, row, where)


_UNPAIRED = "which this method cannot use; give pairs: prompt, chosen, rejected (or response_a, response_b, label)"


def _alpaca_prompt(row: dict, where: str) -> Messages:
    """Reads Alpaca's `instruction`, with its `input` below it where there is one."""
    (message,) = prompt_messages(row["instruction"], f"{where}: instruction")
    if row.get("input"):
        (more,) = prompt_messages(row["input"], f"{where}: input")
        message = {"role": "user", "content": f"{message['content']}\n\n{more['content']}"}
    return [message]


def _refuse_tools(row: dict, where: str) -> None:
    if row.get("tools") not in (None, "", "[]", "null", []):
        raise InputError(f"{where}: has 'tools', which are not supported; leave such rows out")


def _find(row: dict, names: Sequence[str]) -> str | None:
    """Returns the first of the names whose column has a value here, else the first that is there, else None."""
    present = [name for name in names if name in row]
    # A table has every column in every row.
    return next((name for name in present if row[name] is not None), present[0] if present else None)


def _lacks(row: dict, names: Sequence[str], where: str, advice: str = "") -> InputError:
    first, *others = map(repr, names)
    either = f" (or {', '.join(others)})" if others else ""
    if "text" in row:
        advice = "a plain text has no turns: convert it to 'messages', or to 'prompt' and 'response'"
    return InputError(f"{where}: lacks the key {first}{either}; has {_keys(row)}{f'; {advice}' if advice else ''}")


def external_label(row: dict, names: Sequence[str], where: str) -> float | None:
    """Reads the probability that response_a is better.

    Args:
      names: of the label's column; the first that has a value counts.

    Returns:
      The probability, or None where the row has none.

    Raises:
      InputError: the value is not a number from 0 to 1.
    """
    key = _find(row, names)
    value = row[key] if key is not None else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"{where}: {key}: must be a number from 0 to 1, not {short(value)}")
    return float(value)


def need(row: dict, key: str, where: str) -> Any:
    """Returns the value of a key that a row must have.

    Raises:
      InputError: the row lacks the key.
    """
    if key not in row:
        raise InputError(f"{where}: lacks the key {key!r}; has {_keys(row)}")
    return row[key]


def _keys(row: Sequence[str] | dict) -> str:
    names = [short(name) for name in row]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "none"
