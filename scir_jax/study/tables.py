"""A study's results as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

from scir_jax.evaluation.intervals import mean_and_error
from scir_jax.run.columns import COLUMNS, KEYS
from scir_jax.study.plan import LONGER, TABLE
from scir_jax.study.results import COSTS, SFT, SHARED, of

ANSWERS = ("quality", "exact", "greedy_quality", "win_rate", "distinct", "length")
REWARDS = ("generative_accuracy", "implicit_accuracy", "agreement", "selected", "label_accuracy")
DIFFERENCES = ("quality", "greedy_quality", "win_rate", "generative_accuracy", "implicit_accuracy", "agreement")
BY_ITERATION = (
    "quality", "greedy_quality", "distinct", "generative_accuracy", "implicit_accuracy", "agreement", "label_accuracy",
)  # fmt: skip
DRIFT = ("entropy", "kl", "eos_rate", "verdict_mass")
TITLES = {column.key: column.title for column in COLUMNS} | {
    "processor_seconds": "processor seconds",
    "cost.flops": "TFLOPs",
    "cost.memory": "memory, MiB",
}
UNITS = {"cost.flops": 1e12, "cost.memory": 2**20}
WIDE = {"length": 2, "distinct": 2, "kl": 2}
"""digits behind the point, 3 for others"""

Row = dict[str, Any]


def markdown(found: dict[str, Any]) -> str:
    """Writes the page study.md.

    Args:
      found: as results.collect makes it, with `tables`.
    """
    parts = [f"# {found['name']}", "```sh\n" + found["command"] + "\n```"]
    seeds = ", ".join(map(str, found["seeds"]))
    parts.append(
        f"Seeds {seeds}. Figures are means over seeds ± standard errors. Differences are paired by seed; in brackets stand "
        "bootstrap 95 % intervals. *sft* is M1, from which the methods go on."
    )
    if found["missing"]:
        parts.append(
            f"**Not all runs are there**: {len(found['missing'])} are missing, {found['missing'][0]} is the first."
        )
    if diverged := [run for run in found["runs"] if run["diverged"]]:
        names = ", ".join(f"{run['method']} (seed {run['seed']}, {run['kind']})" for run in diverged)
        parts.append(f"**Diverged**, and in no mean: {names}.")
    for iterations, rows in found["tables"].items():
        parts += [f"## After {iterations} iterations", *_tables(found, rows)]
    if found["tuning"]:
        parts += ["## Tuning", _tuning(found)]
    for column in dict.fromkeys((found["by"], *BY_ITERATION)):
        if made := _by_iteration(found, column):
            parts.append(f"## By iteration: {TITLES[column]}\n\n{made}")
    parts += ["## The study", "```yaml\n" + found["study"].rstrip() + "\n```"]
    return "\n\n".join(parts) + "\n"


def _tables(found: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Writes the tables after some iterations."""
    parts = []
    seeds = max((row["seeds"] for row in rows), key=len)
    # What is missing on a seed is no mean over the same worlds.
    rows = [row if row["seeds"] == seeds else row | {"method": _on_seeds(row)} for row in rows]

    def add(title: str, rows: Sequence[Row], columns: Sequence[str], cell: Callable[[Row, str], str]) -> None:
        if made := _grid(rows, columns, cell):
            parts.append(f"### {title}\n\n{made}")

    for title, columns in (("Answers", ANSWERS), ("Reward models and labels", REWARDS), ("Drift", DRIFT)):
        add(title, rows, columns, lambda row, name: _mean(row["columns"].get(name), WIDE.get(name, 3)))
    compared = [row for row in rows if row.get("differences")]
    others = list(dict.fromkeys(row["against"] for row in compared))
    if len(others) > 1:
        compared = [row | {"method": f"{row['method']} less {row['against']}"} for row in compared]
    less = f"Less {others[0]}" if len(others) == 1 else "Differences"
    for title, names in ((f"{less}: answers", DIFFERENCES[:3]), (f"{less}: reward models", DIFFERENCES[3:])):
        add(title, compared, names, lambda row, name: _difference(row["differences"].get(name)))
    gained = [row for row in rows if row.get("gains")]
    for title, names in (("answers", DIFFERENCES[:3]), ("reward models", DIFFERENCES[3:])):
        add(f"Less {SFT}, M1: {title}", gained, names, lambda row, name: _difference(row["gains"].get(name)))
    reached = [row for row in rows if row.get("shares")]
    goal = ", ".join(found["oracles"])
    add(f"Share of the way from sft to {goal}", reached, SHARED, lambda row, name: _share(row["shares"].get(name)))
    add("Cost of a run", rows, COSTS, _cost)
    accounted = list(dict.fromkeys(name for row in rows for name in row["columns"] if name.startswith("cost.")))
    for i in range(0, len(accounted), 4):
        add("Tokens and more of a run, without evaluation", rows, accounted[i : i + 4], _cost)
    return parts


def _on_seeds(row: Row) -> str:
    return f"{row['method']} (seeds {', '.join(map(str, row['seeds']))})"


def _grid(rows: Sequence[Row], columns: Sequence[str], cell: Callable[[Row, str], str]) -> str:
    """Writes a table with one row per method; columns that no method has are left out, and so is an empty table."""
    shown = [name for name in columns if any(cell(row, name) != "–" for row in rows)]
    titles = [TITLES.get(name, name.removeprefix("cost.").replace("_", " ")) for name in shown]
    return table(["method", *titles], [[row["method"], *(cell(row, name) for name in shown)] for row in rows if shown])


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table, nothing where there are no rows."""
    lines = [titles, ["---"] * len(titles), *rows] if rows else []
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _tuning(found: dict[str, Any]) -> str:
    rows = []
    for method, tuning in found["tuning"].items():
        tried = ", ".join(
            f"{_settings(p['settings'])}: {'diverged' if p['score'] is None else format(p['score'], '.3f')}"
            for p in tuning["points"]
        )
        edge = f"edge of {', '.join(tuning['edges'])}" if tuning["edges"] else "inside"
        rows.append([method, _settings(tuning["chosen"]), edge, str(tuning["runs"]), tried])
    keys = list(dict.fromkeys(key for tuning in found["tuning"].values() for key in tuning["chosen"]))
    seeds = ", ".join(map(str, found["tune_seeds"]))
    sentence = (
        f"{', '.join(keys)}, by the mean of {found['by']} on seeds {seeds}. Where a value at the edge of those that were "
        "tried is the best, a better one may lie beyond."
    )
    return sentence + "\n\n" + table(["method", "chosen", "where", "runs", "tried"], rows)


def _by_iteration(found: dict[str, Any], column: str) -> str:
    """Writes the means of a column, one column of the table per model; empty where no model of no method has it."""
    means = {method: curve(found, method, column) for method in found["methods"]}
    models = range(max((max(of_one, default=0) for of_one in means.values()), default=0) + 1)
    digits = WIDE.get(column, 3)
    rows = [
        [method, *(f"{of_one[number][0]:.{digits}f}" if number in of_one else "–" for number in models)]
        for method, of_one in means.items()
        if of_one
    ]
    return table(["method", *(f"M{number + 1}" for number in models)], rows)


def curve(found: dict[str, Any], method: str, column: str) -> dict[int, tuple[float, float | None]]:
    """Computes the mean and the standard error of a column after 0, 1, ... iterations, of the longest runs there are.

    Returns:
      Iterations -> mean and error, for the models of which all runs have the column.
    """
    runs = of(found, LONGER, method) or of(found, TABLE, method)
    result = {}
    for number in range(min((len(run["rows"]) for run in runs), default=0)):
        values = [run["rows"][number].get(column) for run in runs]
        if None not in values:
            result[number] = mean_and_error(values)
    return result


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items()) or "–"


def _mean(value: Sequence[float | None] | None, digits: int) -> str:
    if value is None:
        return "–"
    mean, error = value
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _interval(value: dict[str, Any], form: str) -> str:
    ends = value["interval"]
    return f" [{format(ends[0], form)}, {format(ends[1], form)}]" if ends else ""


def _difference(value: dict[str, Any] | None) -> str:
    return "–" if value is None else f"{value['mean']:+.3f}" + _interval(value, "+.3f")


def _share(value: dict[str, Any] | None) -> str:
    return "–" if value is None else f"{value['share']:.0%}" + _interval(value, ".0%")


def _cost(row: Row, name: str) -> str:
    value = row["columns"].get(name)
    return "–" if value is None else f"{value[0] / UNITS.get(name, 1):,.{2 if name == 'cost.flops' else 0}f}"


def rows_csv(found: dict[str, Any]) -> str:
    """Writes the rows of study.csv, one per run and model; costs stand in the last row of a run."""
    costs = list(dict.fromkeys(name for run in found["runs"] for name in run["costs"]))
    settings = list(dict.fromkeys(key for run in found["runs"] for key in run["settings"]))
    names = ["kind", "method", "seed", *settings, "model", *KEYS, "processor_seconds", *costs]
    target = io.StringIO()
    writer = csv.DictWriter(target, names, restval="", lineterminator="\n")
    writer.writeheader()
    for run in found["runs"]:
        for number, row in enumerate(run["rows"]):
            of_run = {"kind": run["kind"], "method": run["method"] or SFT, "seed": run["seed"], **run["settings"]}
            cost = {"processor_seconds": run["processor_seconds"], **run["costs"]}
            writer.writerow(of_run | {"model": f"M{number + 1}"} | row | (cost if row is run["rows"][-1] else {}))
    return target.getvalue()
