"""Files of other evaluations: AlpacaEval's model_outputs.json and annotations.json, and MT-Bench's answers."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scir_jax.config.columns import ColumnsConfig
from scir_jax.data import records, sources
from scir_jax.data.messages import Messages, answer_text, prompt_text
from scir_jax.errors import InputError
from scir_jax.evaluation.win_rates import Gamed


class Output(NamedTuple):
    """A model's answer to a prompt.

    Attributes:
      key: what answers to one question have in common: the prompt's text, or a question's number and turn.
      messages: the prompt.
      text: the answer.
      generator: name of the model, "" where the file names none.
      dataset: that the prompt is from.
      where: names the row.
    """

    key: str
    messages: Messages
    text: str
    generator: str
    dataset: str
    where: str


class Compared(NamedTuple):
    """Two answers to a prompt, the baseline's first, as AlpacaEval's annotations have them.

    Attributes:
      preference: probability that the model's answer is better, NaN where nobody knows.
    """

    baseline: Output
    model: Output
    preference: float = math.nan


def read_outputs(source: str, columns: ColumnsConfig, questions: str | None = None) -> list[Output]:
    """Reads a model's answers: AlpacaEval's outputs, MT-Bench's answers, or rows of a prompt and a response.

    Args:
      source: rows of `instruction` and `output`; of `question_id` and `choices`; or of `prompt` and `response`, as the
        command sample writes them.
      questions: file of MT-Bench's questions, `question_id` and `turns`; its answers need it.

    Raises:
      InputError: the file is missing, or a row is of no such kind.
    """
    asked = None if questions is None else read_questions(questions)
    found: list[Output] = []
    for where, row in sources.rows(source):
        if isinstance(row, InputError):
            raise row
        if "choices" in row:
            if asked is None:
                raise InputError(f"{where}: answers of MT-Bench need its questions: give --questions FILE")
            found += _mt_bench(row, asked, where)
        else:
            found.append(_output(row, columns, where))
    if not found:
        raise InputError(f"{source}: the file has no rows")
    return found


def read_questions(source: str) -> dict[str, list[str]]:
    """Reads MT-Bench's questions: question_id -> its user's turns.

    Raises:
      InputError: the file is missing, or a row is no question.
    """
    found: dict[str, list[str]] = {}
    for where, row in sources.rows(source):
        if isinstance(row, InputError):
            raise row
        turns = records.need(row, "turns", where)
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise InputError(f"{where}: turns: expected a list of texts")
        name = str(records.need(row, "question_id", where))
        if name in found:
            raise InputError(f"{where}: the question_id {name} occurs twice")
        found[name] = turns
    if not found:
        raise InputError(f"{source}: the file has no rows")
    return found


def match(baseline: Sequence[Output], model: Sequence[Output], files: tuple[str, str]) -> list[Compared]:
    """Puts the answers to each question side by side, in the baseline's order.

    A question that occurs several times, answered by several samples, is matched by its occurrences in order.

    Args:
      files: the baseline's and the model's, for errors.

    Raises:
      InputError: a question is answered in one file and not in the other.
    """
    theirs, ours = _numbered(baseline), _numbered(model)
    for here, there, names in ((theirs, ours, files), (ours, theirs, files[::-1])):
        for key, output in here.items():
            if key not in there:
                raise InputError(f"{output.where}: {names[1]} has no answer to this question; both files need the same")
    return [Compared(output, ours[key]) for key, output in theirs.items()]


def read_annotations(source: str) -> list[Compared]:
    """Reads annotations as AlpacaEval writes them: `output_1` the baseline's, `output_2` the model's, `preference`.

    A preference goes from 1, the baseline's answer is better, to 2; 0 is 1.5, and null is no preference.

    Raises:
      InputError: the file is missing, a row is no annotation, or it holds those of several models.
    """
    found: list[Compared] = []
    for where, row in sources.rows(source):
        if isinstance(row, InputError):
            raise row
        texts = [answer_text(records.need(row, key, where), f"{where}: {key}") for key in ("output_1", "output_2")]
        names = [str(row.get(key) or "") for key in ("generator_1", "generator_2")]
        messages = _messages(row, records.COLUMNS, where) if row.get("instruction") else []
        dataset = str(row.get("dataset") or "")
        sides = [Output(where, messages, text, name, dataset, where) for text, name in zip(texts, names)]
        preference = _preference(records.need(row, "preference", where), f"{where}: preference")
        found.append(Compared(sides[0], sides[1], preference))
        for side in ("baseline", "model"):
            first, this = getattr(found[0], side).generator, getattr(found[-1], side).generator
            if first != this:
                raise InputError(
                    f"{where}: is about {this!r}, rows before it about {first!r}; give one file per pair of models"
                )
    if not found:
        raise InputError(f"{source}: the file has no rows")
    return found


def named(compared: Sequence[Compared], names: tuple[str | None, str | None]) -> list[Compared]:
    """Returns the pairs with these names of the model and of the baseline where their files give none."""
    ours, theirs = (name or "" for name in names)
    return [
        pair._replace(
            model=pair.model._replace(generator=pair.model.generator or ours),
            baseline=pair.baseline._replace(generator=pair.baseline.generator or theirs),
        )
        for pair in compared
    ]


def annotation_rows(compared: Sequence[Compared], annotator: str) -> list[dict[str, Any]]:
    """Returns the rows of annotations.json; the preference goes from 1 to 2, null where nobody knows."""
    return [
        {
            "instruction": prompt_text(pair.baseline.messages),
            "output_1": pair.baseline.text,
            "generator_1": pair.baseline.generator,
            "dataset": pair.model.dataset,
            "output_2": pair.model.text,
            "generator_2": pair.model.generator,
            "annotator": annotator,
            "preference": None if math.isnan(pair.preference) else 1 + pair.preference,
        }
        for pair in compared
    ]


def output_rows(rows: Sequence[Mapping[str, Any]], generator: str, dataset: str) -> list[dict[str, str]]:
    """Returns the rows of model_outputs.json for answers as the command sample writes them."""
    return [
        {"instruction": row["prompt"], "output": row["response"], "generator": generator, "dataset": dataset}
        for row in rows
    ]


def read_gamed(path: str) -> Gamed:
    """Reads AlpacaEval's df_gamed.csv, which holds the instructions' difficulties too.

    Raises:
      InputError: the file is missing, or lacks a column or a number.
    """
    names = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in names if name not in (reader.fieldnames or ())]:
            raise InputError(f"{path}: lacks the column {missing[0]!r}; it must be AlpacaEval's df_gamed.csv")
        table: list[list[float]] = []
        for number, row in enumerate(reader, 2):
            try:
                *values, flag = (row[name] for name in names)
                index, preference, *features = (float(value) if value else math.nan for value in values)
                if flag not in ("True", "False") or not np.isfinite([index, *features]).all():
                    raise ValueError
            except (TypeError, ValueError):
                raise InputError(f"{path}:{number}: expected numbers, and True or False in the last column") from None
            table.append([index, preference, *features, float(flag == "True")])
    if not table:
        raise InputError(f"{path}: the file has no rows")
    columns = np.array(table).T
    first: dict[int, float] = {}
    for index, difficulty in zip(columns[0].astype(int), columns[3]):
        first.setdefault(int(index), float(difficulty))
    by_instruction = np.array([first[index] for index in sorted(first)])
    return Gamed(columns[1], columns[2], columns[3], columns[4], by_instruction)


# --- rows -----------------------------------------------------------------------------------------------------------


def _output(row: dict[str, Any], columns: ColumnsConfig, where: str) -> Output:
    names = ("output",) if "instruction" in row else columns.response
    key = next((name for name in names if name in row), None)
    if key is None:
        raise InputError(f"{where}: lacks the answer: 'output' beside 'instruction', or {names[0]!r} beside the prompt")
    # What the command sample writes has the turns of a prompt in `messages`, and their text in `prompt`.
    messages = _messages({"prompt": row["messages"]} if "messages" in row else row, columns, where)
    text = answer_text(row[key], f"{where}: {key}")
    generator, dataset = (str(row.get(name) or "") for name in ("generator", "dataset"))
    return Output(prompt_text(messages), messages, text, generator, dataset, where)


def _messages(row: dict[str, Any], columns: ColumnsConfig, where: str) -> Messages:
    try:
        ((_, messages),) = records.read_prompts([row], columns)
    except InputError as error:
        raise InputError(f"{where}{str(error).removeprefix('row 1')}") from None
    return messages


def _mt_bench(row: dict[str, Any], asked: Mapping[str, list[str]], where: str) -> list[Output]:
    """Reads an answer of MT-Bench: one output per choice and turn; the last of several turns holds them all."""
    name = str(records.need(row, "question_id", where))
    if name not in asked:
        raise InputError(f"{where}: the file of questions has no question_id {name}")
    questions, found = asked[name], []
    for choice in row["choices"] if isinstance(row["choices"], list) else [None]:
        turns = choice.get("turns") if isinstance(choice, dict) else None
        if not isinstance(turns, list) or len(turns) != len(questions) or not all(isinstance(t, str) for t in turns):
            raise InputError(f"{where}: choices: expected a list with {len(questions)} 'turns', as the question has")
        for turn in range(len(turns)):
            # A judge sees one prompt with two answers, so that what follows the first question is the answer.
            later = zip(questions[1 : turn + 1], turns[1:])
            text = turns[0] + "".join(f"\n\nuser: {question}\n\nassistant: {answer}" for question, answer in later)
            messages = [{"role": "user", "content": questions[0]}]
            generator = str(row.get("model_id") or "")
            found.append(Output(f"{name}, turn {turn + 1}", messages, text, generator, "mt_bench", where))
    return found


def _preference(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value == 0 or 1 <= value <= 2):
        raise InputError(f"{where}: must be a number from 1 to 2, 0 for a draw, or null, not {value!r}")
    return 0.5 if value == 0 else float(value) - 1


def _numbered(outputs: Sequence[Output]) -> dict[tuple[str, int], Output]:
    count: dict[str, int] = {}
    found = {}
    for output in outputs:
        number = count.get(output.key, 0)
        count[output.key] = number + 1
        found[output.key, number] = output
    return found
