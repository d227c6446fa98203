"""What is counted of a run's stages, and the table of it; see scir_jax.run.costs for how it is counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from scir_jax.data.jsonl import read_json, write_json

COUNTS, SECONDS, MEMORY = "costs.json", "seconds.json", "memory.json"
"""files of an iteration: stage -> its counts, its seconds, its peak memory"""
STAGES = {
    "start": "import of M0",
    "sft": "supervised fine-tuning",
    "sample": "sampling",
    "construct": "constructing pairs",
    "score": "pairing and scoring",
    "optimise": "optimisation",
    "evaluate": "evaluation",
}
"""stage -> what it is called, in the order of an iteration"""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What was computed, all tokens without padding.

    Attributes:
      generated: tokens of sampled answers.
      scored: tokens of the rows whose answers a frozen model gave log-probabilities or rewards.
      judged: tokens of the questions that a frozen judge answered.
      trained_policy: tokens of prompts and answers that the policy was trained on.
      trained_judge: tokens of judge questions that a training step asked about pairs, and of constructed pairs.
      trained_replay: tokens of supervised rows, in SFT and replayed.
      flops: model FLOPs, see scir_jax.engine.cost.flops.
    """

    generated: int = 0
    scored: int = 0
    judged: int = 0
    trained_policy: int = 0
    trained_judge: int = 0
    trained_replay: int = 0
    flops: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, times: int) -> Counts:
        return Counts(*(value * times for value in dataclasses.astuple(self)))


FIELDS = tuple(field.name for field in dataclasses.fields(Counts))


def put(path: Path, stage: str, value: Any) -> None:
    """Writes what is known of a stage into a file of its iteration."""
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**_read(path), stage: value})


def table(directory: Path) -> dict[str, Any]:
    """Returns the costs of a run so far.

    Args:
      directory: of the run.

    Returns:
      "stages": one mapping for each stage that was run: iteration, stage, seconds, FIELDS, memory in bytes and memory_of, as
      in `memory.peak`, each null where it is not known; "total": the same of all stages, of which the largest memory.
    """
    stages = []
    for folder in sorted(directory.glob("iteration_*")):
        counts, seconds, peaks = (_read(folder / name) for name in (COUNTS, SECONDS, MEMORY))
        # Of a process that was killed just behind a stage there are counts and no seconds.
        for stage in [name for name in STAGES if name in counts or name in seconds]:
            peak, number = peaks.get(stage, {}), int(folder.name.removeprefix("iteration_"))
            row: dict[str, Any] = {"iteration": number, "stage": stage, "seconds": seconds.get(stage)}
            row |= {name: counts.get(stage, {}).get(name) for name in FIELDS}
            stages.append(row | {"memory": peak.get("bytes"), "memory_of": peak.get("of")})
    total: dict[str, Any] = {"seconds": round(sum(row["seconds"] or 0 for row in stages), 2)}
    total |= {name: sum(row[name] or 0 for row in stages) for name in FIELDS}
    largest = max(stages, key=lambda row: row["memory"] or 0, default={})
    return {"stages": stages, "total": total | {key: largest.get(key) for key in ("memory", "memory_of")}}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
