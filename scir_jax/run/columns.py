"""The columns of the table of models: the one list that the run, its report and a study show."""

from __future__ import annotations

from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of the table.

    Attributes:
      key: in evaluation.json and summary.json.
      title: what a person reads.
      form: format of a value.
      graded: it needs a grader.
    """

    key: str
    title: str
    form: str = "{:.3f}"
    graded: bool = False


MODEL = Column("model", "model", "{}")
COLUMNS = (
    Column("quality", "quality", graded=True),
    Column("exact", "exact", graded=True),
    Column("greedy_quality", "greedy", graded=True),
    Column("win_rate", "win v. M1"),
    Column("generative_accuracy", "GRM acc."),
    Column("implicit_accuracy", "IRM acc."),
    Column("agreement", "agreement"),
    Column("selected", "selected"),
    Column("label_accuracy", "label acc.", graded=True),
    Column("verdict_mass", "verdict mass"),
    Column("length", "length", "{:.1f}"),
    Column("entropy", "entropy"),
    Column("kl", "KL to M1"),
    Column("eos_rate", "ended"),
    Column("distinct", "distinct", "{:.2f}"),
    Column("seconds", "seconds", "{:.0f}"),
)
DRIFT = ("verdict_mass", "entropy", "kl", "eos_rate")
"""keys of columns that only the report shows"""
CONSOLE = (MODEL, *(column for column in COLUMNS if column.key not in DRIFT))
"""the columns of the table at the end of a run"""
KEYS = tuple(column.key for column in COLUMNS)
GRADED = tuple(column.key for column in COLUMNS if column.graded)


def cells(row: dict[str, Any], columns: tuple[Column, ...]) -> list[str]:
    """Returns a row's values as texts, "-" for one that it lacks."""
    return [column.form.format(row[column.key]) if row.get(column.key) is not None else "-" for column in columns]
