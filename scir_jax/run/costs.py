"""What a run costs: tokens and model FLOPs, counted once for each unit of work, beside seconds and peak memory.

Counts are those of real tokens, without padding, and follow from the rows' lengths alone. A stage keeps its counts
before its result is there, so that no kill can separate them: whoever does the stage again counts the same again.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.data.reading import Together
from scir_jax.engine.cost import flops, memory
from scir_jax.engine.hosts import hosts
from scir_jax.engine.programs import Programs
from scir_jax.model.architecture import Architecture
from scir_jax.run.counts import MEMORY, SECONDS, Counts, put

TRAINED = {"policy": "trained_policy", "judge": "trained_judge", "constructed": "trained_judge"}
"""part of a training step -> the count that its tokens belong to; supervised rows: "trained_replay\""""


Spend = Callable[[Counts], None]
"""is told what was computed"""


def sampled(programs: Programs, rows: Iterable[Mapping[str, Any]]) -> Counts:
    """Counts sampled answers, rows as in responses.jsonl; each prompt is read once for all its answers."""
    prompts: dict[int, int] = {}
    answers: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        prompts[row["prompt_number"]] = len(row["prompt_ids"])
        answers[row["prompt_number"]].append(len(row["response_ids"]))
    total = Counts()
    for number, lengths in answers.items():
        work = flops.branched_work(programs.arch, prompts[number], lengths)._replace(scored=sum(lengths))
        total += Counts(generated=sum(lengths), flops=flops.of_pass(programs.arch, work, lora=programs.model.lora))
    return total


def scored(programs: Programs, rows: Iterable[Together]) -> Counts:
    """Counts answers that a model gives log-probabilities, what they have in common once."""
    tokens, spent = _read(programs, rows)
    return Counts(scored=tokens, flops=spent)


def asked(programs: Programs, rows: Iterable[Together]) -> Counts:
    """Counts judge's questions about pairs likewise."""
    tokens, spent = _read(programs, rows)
    return Counts(judged=tokens, flops=spent)


def _read(programs: Programs, rows: Iterable[Together]) -> tuple[int, int]:
    """Counts tokens and model FLOPs."""
    tokens = spent = 0
    for one in rows:
        size = one.size
        work = flops.branched_work(programs.arch, one.start, one.tails)
        work = work._replace(scored=size.scored, verdicts=size.verdicts)
        tokens += size.tokens
        spent += flops.of_pass(programs.arch, work, lora=programs.model.lora, heads=len(programs.spans))
    return tokens, spent


def rewarded(arch: Architecture, lengths: Sequence[int]) -> Counts:
    """Counts conversations of these lengths in tokens that a reward model of this architecture gives rewards."""
    return Counts(scored=sum(lengths), flops=flops.of_pass(arch, flops.rows_work(arch, lengths)))


def rated(programs: Programs, lengths: np.ndarray, choices: int) -> Counts:
    """Counts questions to the pointwise judge.

    Args:
      lengths: tokens of each question, int of any shape.
      choices: tokens among which the verdict chooses.
    """
    flat = lengths.reshape(-1).tolist()
    work = flops.rows_work(programs.arch, flat, verdicts=len(flat) * choices // 2)
    return Counts(judged=sum(flat), flops=flops.of_pass(programs.arch, work, lora=programs.model.lora))


def of_steps(rows: Iterable[Mapping[str, Any]]) -> Counts:
    """Adds up training steps, rows of metrics.jsonl."""
    total: dict[str, int] = defaultdict(int)
    for row in rows:
        total["flops"] += int(row.get("flops", 0))
        for name, value in row.items():
            if name.startswith("tokens/"):
                total[TRAINED.get(name.removeprefix("tokens/"), "trained_replay")] += int(value)
    return Counts(**total)


class Account:
    """The counts of one stage.

    Attributes:
      counts: up to now.
    """

    def __init__(self, path: Path | None = None, stage: str = ""):
        """
        Args:
          path: where they are kept; None: nowhere.
        """
        self.counts = Counts()
        self._path, self._stage = path, stage

    def add(self, counts: Counts) -> None:
        """Adds what was computed."""
        self.counts += counts

    def keep(self) -> None:
        """Writes the counts, which belong to the result that is written next."""
        if self._path is not None and hosts.first():
            put(self._path, self._stage, dataclasses.asdict(self.counts))


def keep_time(folder: Path, stage: str, seconds: float) -> None:
    """Writes the seconds of a stage's last try and the peak memory up to its end; every host calls it.

    Args:
      folder: of the iteration.
    """
    found = hosts.gather(list(memory.peak()))
    if hosts.first():
        most, whose = max(found)
        put(folder / SECONDS, stage, round(seconds, 2))
        put(folder / MEMORY, stage, {"bytes": most, "of": whose})
