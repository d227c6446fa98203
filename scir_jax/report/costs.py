"""What a run cost, stage by stage: seconds, tokens, FLOPs, memory and padding, as the page shows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from scir_jax.report.contents import RunFiles, is_number
from scir_jax.run.counts import FIELDS, STAGES

COLUMNS = (
    ("seconds", "seconds"),
    ("generated", "generated"),
    ("scored", "scored"),
    ("judged", "judged"),
    ("trained_policy", "trained: policy"),
    ("trained_judge", "judge"),
    ("trained_replay", "replay"),
    ("flops", "TFLOP"),
    ("memory", "peak GiB"),
    ("filled", "padding"),
)
"""field of `Cost` -> what the page calls it; tokens, where nothing else is said"""


class Cost(NamedTuple):
    """One stage of one iteration, or the whole run; None where a figure is not known.

    Attributes:
      iteration: its number; "" for the whole run.
      stage: what it is called.
      seconds: of wall-clock time, compilation included.
      counts: tokens and model FLOPs, see scir_jax.run.counts.Counts.
      memory: peak, bytes.
      filled: share of the places of training's rows that held a token; None for other stages.
    """

    iteration: str
    stage: str
    seconds: float | None
    counts: dict[str, int]
    memory: int | None = None
    filled: float | None = None


def costs(run: RunFiles) -> list[Cost]:
    """Returns the stages that a run has finished, in order."""
    found = []
    for iteration in run.iterations:
        for stage, title in STAGES.items():
            seconds = iteration.seconds.get(stage)
            if not is_number(seconds):
                continue
            steps = [m for m in run.metrics if (m.get("stage"), m.get("iteration")) == (stage, iteration.number)]
            counts, peak = iteration.counts.get(stage), iteration.memory.get(stage)
            counts = counts if isinstance(counts, dict) else {}
            known = {name: counts[name] for name in FIELDS if is_number(counts.get(name))}
            memory = peak.get("bytes") if isinstance(peak, dict) else None
            memory = memory if is_number(memory) else None
            found.append(Cost(f"{iteration.number}", title, float(seconds), known, memory, _filled(steps)))
    return found


def shown(found: list[Cost]) -> list[list[str]]:
    """Returns the cells of the table of costs with its heading; the last row is the whole run."""
    if not found:
        return []
    sums = {name: _total(cost.counts.get(name) for cost in found) for name in FIELDS}
    peaks = [cost.memory for cost in found if cost.memory is not None]
    counts = {name: value for name, value in sums.items() if value is not None}
    whole = Cost("", "all stages", sum(cost.seconds or 0 for cost in found), counts, max(peaks, default=None))
    heading = ["iteration", "stage", *(title for _, title in COLUMNS)]
    return [heading, *([cost.iteration, cost.stage, *_cells(cost)] for cost in (*found, whole))]


def whose(run: RunFiles) -> str:
    """Returns whose peak memory is known: "device", "process", or "" where it is both's or neither's."""
    peaks = [peak for iteration in run.iterations for peak in iteration.memory.values() if isinstance(peak, dict)]
    found = {str(peak.get("of")) for peak in peaks}
    return found.pop() if len(found) == 1 else ""


def _cells(cost: Cost) -> list[str]:
    texts = {name: f"{value:,}" if value else "0" for name, value in cost.counts.items()}
    if "flops" in cost.counts:
        texts["flops"] = _digits(cost.counts["flops"] / 1e12)
    if cost.seconds is not None:
        texts["seconds"] = f"{cost.seconds:,.1f}"
    if cost.memory is not None:
        texts["memory"] = _digits(cost.memory / 2**30)
    if cost.filled is not None:
        texts["filled"] = f"{1 - cost.filled:.0%}"
    return [texts.get(name, "–") for name, _ in COLUMNS]


def _digits(value: float) -> str:
    """Writes a number with three digits at the least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _total(values: Iterable[Any]) -> int | None:
    numbers = [value for value in values if is_number(value)]
    return round(sum(numbers)) if numbers else None


def _filled(steps: list[dict]) -> float | None:
    """Returns the share of all places of the steps that held a token: a step has tokens / filled places."""
    known = [(m["tokens"], m["filled"]) for m in steps if is_number(m.get("tokens")) and is_number(m.get("filled"))]
    known = [(tokens, filled) for tokens, filled in known if tokens > 0 and filled > 0]
    if not known:
        return None
    return sum(tokens for tokens, _ in known) / sum(tokens / filled for tokens, filled in known)
