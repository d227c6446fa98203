"""What a run directory holds, as its report needs it; whatever is missing or unreadable is named, not fatal."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scir_jax.errors import InputError
from scir_jax.run.columns import GRADED, KEYS
from scir_jax.run.counts import COUNTS, MEMORY, SECONDS
from scir_jax.run.manifest import LAYOUT

MAX_CHARACTERS = 4000  # of one prompt or response in the table of pairs
SAMPLED_PAIRS = 20
SEED = 0


@dataclass
class IterationFiles:
    """What one `iteration_NN` directory holds; a file that is not there leaves its field empty."""

    number: int
    evaluation: dict
    first: dict[int, dict]  # pair -> its first decision
    last: dict[int, dict]  # pair -> its last decision
    pairs: list[dict]  # the sampled ones only
    lengths: list[int]  # tokens of every response
    cut: int  # responses that the length limit stopped
    seconds: dict  # stage -> wall-clock seconds
    counts: dict  # stage -> tokens and FLOPs
    memory: dict  # stage -> peak memory


@dataclass
class RunFiles:
    """A run directory as read, with sentences about what could not be read."""

    metrics: list[dict]
    iterations: list[IterationFiles]
    rows: list[dict]
    notices: list[str]
    best: str | None = None  # the model that was exported
    select: str | None = None  # by what it was chosen


def parse(text: str) -> dict | None:
    """Reads the mapping that a JSON text is; None for another text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path, notices: list[str]) -> Iterator[dict]:
    """Yields the mappings of a JSON-lines file; lines that are none (a write cut short) are counted in `notices`."""
    if not path.is_file():
        return
    bad = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            if (record := parse(line)) is None:
                bad += 1
            else:
                yield record
    if bad:
        name = f"{path.parent.name}/{path.name}"
        notices.append(f"{name}: {bad} unreadable {'line was' if bad == 1 else 'lines were'} left out.")


def read_text(path: Path) -> str | None:
    """Reads a text file's content; None if it is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def read_mapping(path: Path, notices: list[str]) -> dict:
    """Reads the mapping in a JSON file; empty if the file is not there or cannot be read."""
    if (text := read_text(path)) is None:
        return {}
    if (value := parse(text)) is None:
        notices.append(f"{path.parent.name}/{path.name} cannot be read.")
    return value or {}


def read_iteration(directory: Path, notices: list[str]) -> IterationFiles:
    """Reads one iteration's files; those of many pairs are streamed, and only the sampled texts are kept."""
    number = int(directory.name.removeprefix("iteration_"))
    wanted = ["evaluation.json"] + (["responses.jsonl", "pairs.jsonl", "decisions.jsonl"] if number else [])
    absent = [name for name in wanted if not (directory / name).is_file()]
    if absent:
        notices.append(f"{directory.name}: {', '.join(absent)} not there.")

    first, last = {}, {}
    for decision in read_lines(directory / "decisions.jsonl", notices):
        if isinstance(pair := decision.get("pair"), int):
            first.setdefault(pair, decision)
            last[pair] = decision

    known = [p["pair"] for p in read_lines(directory / "pairs.jsonl", []) if isinstance(p.get("pair"), int)]
    chosen = set(sample_pairs(known, last, random.Random(SEED + number)))
    texts = read_lines(directory / "pairs.jsonl", notices)
    pairs = [p for p in texts if isinstance(p.get("pair"), int) and p["pair"] in chosen]

    lengths, cut = [], 0
    for response in read_lines(directory / "responses.jsonl", notices):
        if isinstance(ids := response.get("response_ids"), list):
            lengths.append(len(ids))
            cut += response.get("stop") == "length"
    evaluation = read_mapping(directory / "evaluation.json", notices)
    spent = [read_mapping(directory / name, notices) for name in (SECONDS, COUNTS, MEMORY)]
    return IterationFiles(number, evaluation, first, last, pairs, lengths, cut, *spent)


def sample_pairs(known: list[int], decisions: dict[int, dict], source: random.Random) -> list[int]:
    """Chooses pairs to show: half of them agreed and half not where there are enough of both, then any others."""
    order = sorted(set(known))
    source.shuffle(order)
    agreed = [pair for pair in order if decisions.get(pair, {}).get("agreed") is True]
    against = [pair for pair in order if decisions.get(pair, {}).get("agreed") is False]
    half = SAMPLED_PAIRS // 2
    return list(dict.fromkeys(agreed[:half] + against[:half] + agreed + against + order))[:SAMPLED_PAIRS]


def read_run(directory: Path) -> RunFiles:
    """Reads everything that the page shows of a run directory.

    Raises:
      InputError: there is neither a step nor an evaluation to show.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory.")
    notices: list[str] = []
    steps = {m["step"]: m for m in read_lines(directory / "metrics.jsonl", notices) if isinstance(m.get("step"), int)}
    folders = [path for path in directory.iterdir() if path.is_dir() and re.fullmatch(r"iteration_\d+", path.name)]
    folders.sort(key=lambda path: int(path.name.removeprefix("iteration_")))
    iterations = [read_iteration(folder, notices) for folder in folders]

    summarised = read_mapping(directory / "summary.json", notices)
    summary = summarised.get("rows")
    rows = {str(r.get("model")): r for r in (summary if isinstance(summary, list) else []) if isinstance(r, dict)}
    for iteration in iterations:
        if iteration.evaluation:
            row = {"model": f"M{iteration.number + 1}"} | iteration.evaluation
            if spent := [value for value in iteration.seconds.values() if is_number(value)]:
                row["seconds"] = round(sum(spent), 1)
            # The evaluation wins: a summary can be older than a resumed run.
            rows[str(row["model"])] = {**rows.get(str(row["model"]), {}), **row}
    if not steps and not rows:
        raise InputError(f"{directory} has neither metrics.jsonl nor an evaluation, so there is nothing to report.")

    if not steps:
        notices.insert(0, "metrics.jsonl is not there or is empty, so there are no curves over steps.")
    if not rows:
        notices.insert(0, "No model has been evaluated yet, so there is no headline table.")
    elif absent := [name for name in KEYS if not any(is_number(row.get(name)) for row in rows.values())]:
        why = " The run has no grader's values." if set(GRADED) <= set(absent) else ""
        notices.insert(0, f"Not in any evaluation: {', '.join(absent)}.{why}")
    if not (directory / "summary.json").is_file():
        notices.insert(0, "summary.json is not there: the run has not finished, and this page shows what it has.")
    if read_mapping(directory / "manifest.json", notices).get("layout", LAYOUT) != LAYOUT:
        notices.insert(
            0, "Another version of scir_jax wrote the run, whose files have another layout: some may be missed."
        )
    best, select = (value if isinstance(value := summarised.get(key), str) else None for key in ("best", "select"))
    return RunFiles([steps[step] for step in sorted(steps)], iterations, list(rows.values()), notices, best, select)


def is_number(value: object) -> bool:
    """Checks whether a value can be drawn: a number, not nan, nor near overflow (true and false count as 1 and 0)."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def column(records: list[dict], name: str) -> np.ndarray:
    """Returns one column of the records as floats, nan where a value is absent or null."""
    return np.array([float(r[name]) if is_number(r.get(name)) else math.nan for r in records])
