"""JSONL files of prompts, conversations and labelled pairs, read strictly: a bad row is named by file and line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scir_jax.errors import InputError

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt. `label` is the probability that `a` is better, None where unknown."""

    messages: Messages
    a: str
    b: str
    label: float | None


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of each line of a JSONL file; `where` is file:line.

    Raises InputError for a file that is missing or empty, and for the first line that is not UTF-8 or not a JSON
    object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory, expected a JSONL file' if path.is_dir() else 'no such file'}")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}:1: starts with a byte-order mark; save the file as UTF-8 without BOM")
    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); convert the file") from None
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(f"{where}: broken JSON{column}: {reason}") from None
        except RecursionError:
            raise InputError(f"{where}: JSON nested too deeply") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
        rows.append((where, row))
    if not rows:
        raise InputError(f"{path}: the file has no rows")
    return rows


def read_prompts(path: str | Path, key: str = "prompt") -> list[Messages]:
    """Conversations that end with a user's turn, one a row."""
    return [prompt_messages(need(row, key, where), f"{where}: {key}") for where, row in read_rows(path)]


def read_conversations(path: str | Path) -> list[Messages]:
    """Conversations with at least one assistant's turn: `messages`, or `prompt` and `response` or `completion`."""
    result = []
    for where, row in read_rows(path):
        if "messages" in row:
            messages = _in_order(check_messages(row["messages"], f"{where}: messages"), f"{where}: messages")
        elif "prompt" in row:
            prompt = prompt_messages(row["prompt"], f"{where}: prompt")
            key = "completion" if "completion" in row else "response"
            messages = [
                *prompt,
                {"role": "assistant", "content": answer_text(need(row, key, where), f"{where}: {key}")},
            ]
        else:
            raise InputError(f"{where}: lacks the key 'messages' (or 'prompt' and 'response'); has {_keys(row)}")
        if not any(m["role"] == "assistant" for m in messages):
            raise InputError(f"{where}: the conversation has no assistant's turn to learn from")
        result.append(messages)
    return result


def read_comparisons(path: str | Path, *, label_key: str = "label", need_label: bool = False) -> list[Comparison]:
    """Pairs of answers: `prompt`, `response_a`, `response_b` with an optional label, or TRL's `chosen`, `rejected`.

    chosen/rejected are texts or lists of messages; without `prompt` the conversations' common beginning is the prompt.

    Args:
      need_label: refuse rows of which neither a label nor chosen/rejected says who is better.
    """
    result = []
    for where, row in read_rows(path):
        if "response_a" in row or "response_b" in row:
            messages = prompt_messages(need(row, "prompt", where), f"{where}: prompt")
            a, b = (answer_text(need(row, k, where), f"{where}: {k}") for k in ("response_a", "response_b"))
            label = _label(row.get(label_key), f"{where}: {label_key}")
        else:
            messages, a, b = _chosen_rejected(row, where)
            label = 1.0
        if need_label and label is None:
            raise InputError(
                f"{where}: lacks the label {label_key!r}: 1 where response_a is better, 0 where response_b is"
            )
        result.append(Comparison(messages, a, b, label))
    return result


def prompt_text(messages: Messages) -> str:
    """A prompt as one text, for a judge's question: the user's words, or the turns with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def prompt_messages(value: Any, where: str) -> Messages:
    """Checks a prompt, a text or a list of messages that ends with a user's turn."""
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where}: is empty")
        _text(value, where)
        return [{"role": "user", "content": value}]
    messages = _in_order(check_messages(value, where), where)
    if messages[-1]["role"] != "user":
        raise InputError(f"{where}: must end with a user's message, ends with {messages[-1]['role']}'s")
    if not messages[-1]["content"].strip():
        raise InputError(f"{where}: is empty")
    return messages


def check_messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a text or a list of messages, found {_type(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"{where}[{i}]: expected an object with the texts 'role' and 'content'")
        if message.get("role") not in ROLES:
            raise InputError(f"{where}[{i}]: role must be one of {', '.join(ROLES)}, not {message.get('role')!r}")
        _text(message["content"], f"{where}[{i}].content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def answer_text(value: Any, where: str) -> str:
    """Checks an answer: a text, or a list with one assistant's message."""
    if isinstance(value, str):
        return _text(value, where)
    messages = check_messages(value, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise InputError(f"{where}: expected a text or one assistant's message")
    return messages[0]["content"]


def need(row: dict, key: str, where: str) -> Any:
    if key not in row:
        raise InputError(f"{where}: lacks the key {key!r}; has {_keys(row)}")
    return row[key]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes a JSONL file whole or not at all."""
    _write(path, map(line, rows))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    _write(path, [json.dumps(value, indent=1, ensure_ascii=False) + "\n"])


def _write(path: Path, texts: Iterable[str]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(texts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def line(row: dict) -> str:
    """One line of a JSONL file. A lone surrogate, which a model's bytes may decode to, is written escaped."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row, allow_nan=False)
    return text + "\n"


def _chosen_rejected(row: dict, where: str) -> tuple[Messages, str, str]:
    sides = [need(row, k, where) for k in ("chosen", "rejected")]
    if "prompt" in row:
        messages = prompt_messages(row["prompt"], f"{where}: prompt")
        texts = []
        for key, side in zip(("chosen", "rejected"), sides):
            if isinstance(side, list) and len(side) > 1:  # the whole conversation
                checked = check_messages(side, f"{where}: {key}")
                if checked[:-1] != messages:
                    raise InputError(f"{where}: {key} does not begin with the prompt")
                side = checked[-1:]
            texts.append(answer_text(side, f"{where}: {key}"))
        return messages, *texts
    if not all(isinstance(side, list) for side in sides):
        raise InputError(
            f"{where}: lacks the key 'prompt' (it may be left out only where chosen and rejected are messages)"
        )
    chosen, rejected = (check_messages(s, f"{where}: {k}") for k, s in zip(("chosen", "rejected"), sides))
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise InputError(f"{where}: chosen and rejected must share all messages but the last")
    messages = prompt_messages(chosen[:-1], f"{where}: chosen")
    return messages, answer_text(chosen[-1:], f"{where}: chosen"), answer_text(rejected[-1:], f"{where}: rejected")


def _in_order(messages: Messages, where: str) -> Messages:
    """Checks that the roles come as chat templates expect them: a system message first if any, then turn by turn."""
    previous = "system"
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system" and i:
            raise InputError(f"{where}[{i}]: a system message may only come first")
        if role == "assistant" and previous == "system":
            raise InputError(f"{where}[{i}]: the first turn must be a user's")
        if role == previous and i:
            raise InputError(f"{where}[{i}]: roles must alternate: {role} follows {previous}")
        previous = role
    return messages


def _label(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"{where}: must be a number from 0 to 1, not {value!r}")
    return float(value)


def _text(value: str, where: str) -> str:
    if any("\ud800" <= c <= "\udfff" or c in "\ue000\ue001" for c in value):
        raise InputError(f"{where}: holds a lone surrogate or a private-use character; clean the text")
    return value


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _keys(row: Sequence[str] | dict) -> str:
    return ", ".join(map(repr, row)) or "none"


def _type(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
