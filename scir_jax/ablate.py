"""python -m scir_jax.ablate: a study, methods against each other over seeds, tuned alike.

STUDY is a YAML file, or the name of one that comes with the package: studies/quick, say.
Each run is a process of its own. A study that was stopped or killed goes on with the same command;
what is finished is not done again, and a run that failed is tried again.
OUTPUT gets study.json, study.md, study.csv and figures. Where runs failed the command ends with 1.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from scir_jax.errors import InputError
from scir_jax.run import command

NARROWING = ("methods", "against", "seeds", "iterations")
"""options that say what of a study is wanted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
      InputError: the study file, an option or the directory cannot be used.
      Interrupted: on Ctrl-C or SIGTERM, after the runs under way have saved what they did.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m scir_jax.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", help="file or name of the study")
    parser.add_argument("--output", type=Path, help="directory of all runs and results")
    parser.add_argument("--dry_run", action="store_true", help="print the runs and an estimate of the hours")
    parser.add_argument("--from", dest="found", type=Path, metavar="study.json", help="make tables and figures anew")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods of the study")
    parser.add_argument("--against", metavar="NAME", help="the method that the others are compared with")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the study's")
    parser.add_argument("--iterations", type=int, metavar="N", help="instead of the study's")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at the same time, instead of the study's")
    options = parser.parse_args(argv)

    from scir_jax.data.jsonl import read_json
    from scir_jax.study.results import narrowed

    if options.found:
        found = read_json(options.found) if options.found.is_file() else None
        if not found or "runs" not in found:
            raise InputError(f"--from {options.found}: is no study.json; give the file that a study wrote")
        if options.study or options.jobs or options.dry_run:
            raise InputError("--from makes no runs: leave the study, --jobs and --dry_run out")
        output, wanted = options.output or options.found.parent, {name: getattr(options, name) for name in NARROWING}
        if any(wanted.values()) and (output / "study.json").resolve() == options.found.resolve():
            raise InputError(f"a part of {options.found} would take the place of all of it: give another --output")
        print(_write(narrowed(found, **wanted), output, figures=True))
        return 0
    if not options.study or not options.output:
        raise InputError("say which study and where its runs lie, as in: studies/quick --output runs/quick")
    return _run(options, "python -m scir_jax.ablate " + shlex.join(argv))


def _run(options: argparse.Namespace, line: str) -> int:
    from scir_jax.run import console
    from scir_jax.study import plots, running, tables  # noqa: F401  all of it now, for a study takes hours
    from scir_jax.study.file import read_study
    from scir_jax.study.plan import Plan
    from scir_jax.study.results import collect

    instead = {name: getattr(options, name) for name in (*NARROWING, "jobs")}
    plan = Plan(read_study(options.study, **instead), options.output.absolute())
    plan.check()
    jobs = plan.jobs(all_of_them=True)
    open_jobs = [job for job in jobs if not (job.decided and plan.finished(job))]
    hours, measured = running.hours(plan, open_jobs)
    rest = "from the runs that are finished" if measured else "a guess, for the quickstart on one core per run"
    estimate = f"{len(open_jobs)} of {len(jobs)} runs to be made, about {hours:.1f} hours ({rest})"
    if options.dry_run:
        print("\n".join([*(job.title for job in open_jobs), estimate]))
        return 0
    lock = running.lock(plan.output)
    console.say(estimate)
    versions = _versions()

    def save(figures: bool = False) -> str:
        return _write(collect(plan, line, versions), options.output, figures=figures)

    try:
        failures = running.run_all(plan, save)
        print(save(figures=True))
    finally:
        lock.release()
    for job, code, lines in failures:
        print(f"{job.title} failed with exit code {code}; its log ends with", file=sys.stderr)
        print("\n".join(f"    {text}" for text in lines), file=sys.stderr)
        print(f"    {running.beside(job.directory, 'log')}", file=sys.stderr)
    if failures:
        print(f"{len(failures)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failures else 0


def _write(found: dict[str, Any], output: Path, *, figures: bool) -> str:
    """Writes study.json, study.md and study.csv, and the figures -> the text of study.md."""
    from scir_jax.data.jsonl import write_json
    from scir_jax.study.results import tables
    from scir_jax.study.tables import markdown, rows_csv

    found = found | {"tables": tables(found)}
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    write_json(output / "study.json", found)
    (output / "study.md").write_text(text, encoding="utf-8")
    (output / "study.csv").write_text(rows_csv(found), encoding="utf-8")
    if figures:
        from scir_jax.study.plots import write_plots

        write_plots(found, output)
    return text


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("scir_jax", "jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


if __name__ == "__main__":
    command.main(main)
