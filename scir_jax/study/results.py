"""What a study found, as one JSON object: every run's rows, and means, differences and shares that are made of them.

name, study, command, versions     the file's text, the command, what it ran with
seeds, tune_seeds, iterations, by, against, oracles, methods
tuning     method -> chosen, edges, grown, runs, points: [{settings, score}]
runs       [{kind, method, settings, seed, iterations, diverged, rows: one per model, M1 first; costs, seconds,
           processor_seconds}]
missing    titles of runs that failed or were not made
tables     iterations -> [{method, settings, seeds, columns: {name: [mean, error]}, differences: {name: {...}},
           gains: {name: {...}}, shares: {name: {...}}}]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scir_jax.errors import InputError
from scir_jax.evaluation.intervals import mean_and_error, paired_difference, share_of_the_way
from scir_jax.run.columns import KEYS
from scir_jax.study.plan import LONGER, START, TABLE, Job, Plan

SFT = "sft"
"""the row of M1, from which all methods go on"""
COMPARED = (
    "quality", "exact", "greedy_quality", "win_rate", "generative_accuracy", "implicit_accuracy", "agreement", "distinct",
)  # fmt: skip
"""columns of which differences are shown"""
SHARED = ("quality", "greedy_quality")
"""columns of which the share of the way to the oracle is shown"""
COSTS = ("processor_seconds", "seconds")


def collect(plan: Plan, command: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Puts together all that is known of a study, finished or not."""
    study = plan.study
    jobs = plan.jobs(all_of_them=True)
    finished = [job for job in jobs if job.decided and plan.finished(job)]
    done = {(job.directory, job.iterations) for job in finished}
    tuning = {}
    for name, method in study.methods.items() if study.tune_seeds else ():
        if (choice := plan.choice(method)) is not None:
            points = [{"settings": dict(p), "score": _finite(value)} for p, value in choice.scores.items()]
            tuning[name] = {
                "chosen": dict(choice.point),
                "edges": list(choice.edges),
                "grown": len(points) - len(method.points()),
                "runs": len(points) * len(study.tune_seeds),
                "points": points,
            }
    return {
        "name": study.name,
        "study": study.text,
        "command": command,
        "versions": dict(versions),
        "seeds": list(study.seeds),
        "tune_seeds": list(study.tune_seeds),
        "iterations": study.iterations,
        "by": study.by,
        "against": study.against,
        "oracles": list(study.oracles),
        "methods": list(study.methods),
        "tuning": tuning,
        "runs": [_run(plan, job) for job in finished],
        "missing": [job.title for job in jobs if (job.directory, job.iterations) not in done],
    }


def _run(plan: Plan, job: Job) -> dict[str, Any]:
    record = plan.record(job)
    rows = record.get("rows", [])[: job.iterations + 1]
    attempts = [attempt for attempt in record["attempts"] if attempt["iterations"] <= job.iterations]
    found = {
        "kind": job.kind,
        "method": job.method or SFT,
        "start": (job.needs or job).directory.parent.name,
        "settings": dict(job.point),
        "seed": job.seed,
        "iterations": job.iterations,
        "diverged": record.get("diverged"),
        "rows": [{key: row[key] for key in KEYS if row.get(key) is not None} for row in rows],
        "costs": costs(record.get("costs"), job.iterations),
    }
    spent = {name: None if record.get("lost") else round(sum(a[name] for a in attempts), 2) for name in COSTS}
    return found | spent


def costs(found: Any, iterations: int) -> dict[str, float]:
    """Adds up what the stages of a run cost up to an iteration, without evaluation; of `memory` the largest one.

    Args:
      found: `costs` of summary.json, with one row of numbers for each stage under `stages`. None of a run that accounts
        nothing: then there is nothing to add up.
    """
    result: dict[str, float] = {}
    for stage in (found or {}).get("stages", ()):
        if stage["iteration"] > iterations or stage["stage"] == "evaluate":
            continue
        for name, value in stage.items():
            if name not in ("iteration", "seconds") and isinstance(value, (int, float)):
                old = result.get(name, 0)
                result[name] = max(old, value) if name == "memory" else old + value
    return result


def narrowed(
    found: dict[str, Any],
    *,
    methods: Sequence[str] | None = None,
    against: str | None = None,
    seeds: Sequence[int] | None = None,
    iterations: int | None = None,
) -> dict[str, Any]:
    """Restricts what a study found to some methods, seeds or first iterations, or compares with another method.

    What a run cost is known of the whole run only, and left out where iterations are.

    Args:
      found: as `collect` makes it. None of the others leaves things as they are.

    Raises:
      InputError: the study has no such method or seed, or fewer iterations.
    """
    for option, asked, there in (
        ("--methods", methods or (), found["methods"]),
        ("--against", [against] if against else (), methods or found["methods"]),
        ("--seeds", seeds or (), found["seeds"]),
    ):
        for one in asked:
            if one not in there:
                raise InputError(f"{option} {one}: the study has {', '.join(map(str, there))}")
    if iterations is not None and not 1 <= iterations <= found["iterations"]:
        raise InputError(f"--iterations {iterations}: the study has {found['iterations']}")
    kept = [name for name in found["methods"] if name in (methods or found["methods"])]
    others = {name: against for name in kept if name != against} if against else found["against"]
    runs = []
    for run in found["runs"]:
        in_table = run["kind"] in (TABLE, LONGER)
        if run["method"] not in (SFT, *kept) or (in_table and seeds and run["seed"] not in seeds):
            continue
        if run["kind"] == TABLE and iterations and iterations < run["iterations"]:
            run = run | {"rows": run["rows"][: iterations + 1], "iterations": iterations, "costs": {}}
            run |= dict.fromkeys(COSTS)
        runs.append(run)
    return found | {
        "methods": kept,
        "against": {name: other for name, other in others.items() if {name, other} <= {*kept}},
        "oracles": [name for name in found["oracles"] if name in kept],
        "seeds": list(seeds or found["seeds"]),
        "iterations": iterations or found["iterations"],
        "tuning": {name: tuning for name, tuning in found["tuning"].items() if name in kept},
        "runs": runs,
    }


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Computes means over seeds, paired differences and shares, after the study's iterations and after the longer ones.

    Args:
      found: as `collect` makes it; its runs are enough.

    Returns:
      Iterations as a text -> one row per method: M1 first, then in the order of the study.
    """
    result = {}
    for iterations in sorted({run["iterations"] for run in found["runs"] if run["kind"] in (TABLE, LONGER)}):
        if iterations != found["iterations"] and not of(found, LONGER, iterations=iterations):
            continue
        kind = TABLE if iterations == found["iterations"] else LONGER
        result[str(iterations)] = _table(found, kind, iterations)
    return result


def _table(found: dict[str, Any], kind: str, iterations: int) -> list[dict[str, Any]]:
    by_method = {name: of(found, kind, name, iterations) for name in found["methods"]}
    by_method = {name: runs for name, runs in by_method.items() if runs}
    starts = {run["start"] for runs in by_method.values() for run in runs}
    result = []
    for start in sorted(starts, key=lambda name: (name != "base", name)):
        users = [name for name, runs in by_method.items() if any(run["start"] == start for run in runs)]
        seeds = {run["seed"] for name in users for run in by_method[name]}
        runs = [run for run in of(found, START) if run["start"] == start and run["seed"] in seeds]
        if runs:
            result.append(_row(SFT if start == "base" else f"{SFT} ({users[0]})", runs))
    for name, runs in by_method.items():
        row, start = _row(name, runs), runs[0]["start"]
        m1 = [run for run in of(found, START) if run["start"] == start]
        row["gains"] = _each(COMPARED, paired_difference, runs, m1)
        other = found["against"].get(name)
        if other in by_method and other != name:
            row["against"] = other
            row["differences"] = _each(COMPARED, paired_difference, runs, by_method[other])
        goals = [
            by_method[goal] for goal in found["oracles"] if goal in by_method and by_method[goal][0]["start"] == start
        ]
        if name not in found["oracles"] and goals:
            row["shares"] = _each(SHARED, share_of_the_way, runs, m1, goals[0])
        result.append(row)
    return result


def of(
    found: dict[str, Any], kind: str, method: str | None = None, iterations: int | None = None
) -> list[dict[str, Any]]:
    """Returns the runs of a kind, of a method, with so many iterations, that did not diverge, by seed."""
    runs = [
        run
        for run in found["runs"]
        if run["kind"] == kind
        and method in (None, run["method"])
        and iterations in (None, run["iterations"])
        and run["rows"]
    ]
    return sorted(runs, key=lambda run: run["seed"])


def last(run: dict[str, Any], column: str) -> float | None:
    """Returns a column of a run's last model, or a cost of the whole run."""
    value = run["rows"][-1].get(column) if run["rows"] else None
    if column in COSTS:
        return run[column]
    return run["costs"].get(column.removeprefix("cost."), value) if column.startswith("cost.") else value


def _row(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = [*(key for key in KEYS if key != "seconds"), *COSTS, *(f"cost.{key}" for key in runs[0]["costs"])]
    found = {}
    for column in columns:
        values = [last(run, column) for run in runs]
        if column in COSTS:
            values = [value for value in values if value is not None]
        if values and None not in values:
            found[column] = list(mean_and_error(values))
    return {"method": name, "settings": runs[0]["settings"], "seeds": [run["seed"] for run in runs], "columns": found}


def _each(columns: Iterable[str], compute: Callable, *groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Computes something of a column on the seeds that all groups of runs have, for each column that all have."""
    by_seed = [{run["seed"]: run for run in runs} for runs in groups]
    seeds = [seed for seed in by_seed[0] if all(seed in runs for runs in by_seed)]
    result = {}
    for column in columns:
        values = [[last(runs[seed], column) for seed in seeds] for runs in by_seed]
        if seeds and all(value is not None for part in values for value in part):
            if (found := compute(*values)) is not None:
                result[column] = found | {"seeds": len(seeds)}
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
