"""What a run cost, stage by stage: seconds, tokens and padding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from scir_jax.report.contents import RunFiles, is_number

STAGES = {
    "start": "import of M0",
    "sft": "supervised fine-tuning",
    "sample": "sampling",
    "construct": "constructing pairs",
    "score": "pairing and scoring",
    "optimise": "optimisation",
    "evaluate": "evaluation",
}
"""stage in seconds.json -> what it is called, in the order of an iteration"""


class Cost(NamedTuple):
    """One stage of one iteration.

    Attributes:
      iteration, stage: which.
      seconds: of wall-clock time, compilation included.
      tokens: without padding: those of training's rows, or those that were sampled; None where nobody counted.
      filled: share of the places of training's rows that held a token; None for other stages.
    """

    iteration: int
    stage: str
    seconds: float | None
    tokens: int | None = None
    filled: float | None = None


def costs(run: RunFiles) -> list[Cost]:
    """Returns the stages that a run has finished, in order."""
    found = []
    for iteration in run.iterations:
        for stage, title in STAGES.items():
            seconds = iteration.seconds.get(stage)
            steps = [m for m in run.metrics if (m.get("stage"), m.get("iteration")) == (stage, iteration.number)]
            tokens = sum(iteration.lengths) if stage == "sample" else _total(m.get("tokens") for m in steps)
            if is_number(seconds):
                found.append(Cost(iteration.number, title, float(seconds), tokens or None, _filled(steps)))
    return found


def shown(found: list[Cost]) -> list[list[str]]:
    """Returns the cells of the table of costs; the last row is the whole run."""
    rows = [_cells(f"{cost.iteration}", cost.stage, cost) for cost in found]
    if found:
        tokens = _total(cost.tokens for cost in found)
        rows.append(_cells("", "all stages", Cost(0, "", sum(cost.seconds for cost in found), tokens)))
    return rows


def _cells(iteration: str, stage: str, cost: Cost) -> list[str]:
    rate = cost.tokens / cost.seconds if cost.tokens and cost.seconds and iteration else None
    return [
        iteration,
        stage,
        f"{cost.seconds:,.1f}",
        "–" if cost.tokens is None else f"{cost.tokens:,}",
        "–" if rate is None else f"{rate:,.0f}",
        "–" if cost.filled is None else f"{1 - cost.filled:.0%}",
    ]


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
