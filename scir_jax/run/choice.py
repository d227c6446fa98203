"""Which model of a run is the best one, and whether its reward models have begun to agree on being wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LAST, CONSENSUS = "last", "consensus"
ACCURACIES = ("generative_accuracy", "implicit_accuracy")
EVEN = {"win_rate": 0.5}
"""what M1's row need not say: its win rate against itself"""


def best(rows: Sequence[dict[str, Any]], select: str, *, early_stop: bool = False) -> dict[str, Any]:
    """Returns the row of the best model, of equal ones the first.

    Args:
      rows: one per evaluated model, M1 first.
      select: as evaluate.select; of rows that all lack its column the last one is the best.
      early_stop: as evaluate.early_stop; the last model is then not the one that ended the run, but that before it.
    """
    if select == LAST and early_stop and agree_on_being_wrong(rows):
        return rows[-2]
    scores = [score(row, select) for row in rows]
    known = [i for i, value in enumerate(scores) if value is not None]
    return rows[max(known, key=lambda i: scores[i])] if known else rows[-1]


def marked(rows: Sequence[dict[str, Any]], best: str | None, select: str | None) -> str | None:
    """Returns the name of the model that tables mark: the exported one, where it is not just the last."""
    return best if select not in (None, LAST) or (rows and best != rows[-1].get("model")) else None


def score(row: dict[str, Any], select: str) -> float | None:
    """Returns what a model is chosen by, None where its row lacks it.

    The consensus is the smaller one of both reward models' accuracies: the best model leaves neither of them behind.
    """
    if select == LAST:
        return None
    if select == CONSENSUS:
        values = [row.get(name) for name in ACCURACIES]
        return None if None in values else min(values)
    return row.get(select, EVEN.get(select))


def agree_on_being_wrong(rows: Sequence[dict[str, Any]]) -> bool:
    """Checks whether between the last two models the agreement rose while both accuracies fell."""
    if len(rows) < 2:
        return False
    before, now = rows[-2:]
    if any(row.get(name) is None for row in (before, now) for name in ("agreement", *ACCURACIES)):
        return False
    return now["agreement"] > before["agreement"] and all(now[name] < before[name] for name in ACCURACIES)
