"""python -m scir_jax.ablate: methods against each other, from one M1 per seed.

Every method is tuned with the same budget.
Each method's learning rate is the one of --rates with the best mean of --by on the tuning seeds;
the table shows the other seeds. Runs that are finished are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from scir_jax.config.files import find
from scir_jax.errors import InputError
from scir_jax.run import command
from scir_jax.run.columns import KEYS

COLUMNS = tuple(key for key in KEYS if key not in ("eos_rate", "seconds"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
      InputError: an option contradicts another one, a configuration is not there, or a run fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scir_jax.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart", help="the configuration that methods are laid over")
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        help="YAML files or names of settings, for example methods/scir methods/srlm",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="seeds of the table (world and run)"
    )
    parser.add_argument(
        "--tune_seeds", nargs="*", type=int, default=[], help="other seeds, for choosing the learning rate"
    )
    parser.add_argument("--rates", nargs="+", default=[], help="values of optimise.learning_rate to choose from")
    parser.add_argument("--by", default="quality", help="column that chooses the rate")
    parser.add_argument("--iterations", type=int, default=3, help="iterations of every method")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--output", type=Path, required=True, help="directory of all runs and of ablation.json")
    arguments = parser.parse_args(argv)
    if set(arguments.seeds) & set(arguments.tune_seeds):
        raise InputError("--seeds and --tune_seeds share a seed: the table would show what was tuned on")
    if arguments.rates and len(arguments.rates) > 1 and not arguments.tune_seeds:
        raise InputError("--rates needs --tune_seeds to choose from")
    for file in (arguments.config, *arguments.methods):
        find(file)
    study = Study(arguments)
    study.starts([*arguments.tune_seeds, *arguments.seeds])
    methods = {Path(file).stem: file for file in arguments.methods}
    rates = {name: arguments.rates[0] if arguments.rates else None for name in methods}
    tuning = {}
    if len(arguments.rates) > 1:
        grid = list(itertools.product(methods, arguments.rates, arguments.tune_seeds))
        study.run_all([(methods[name], name, rate, seed) for name, rate, seed in grid])
        for name in methods:
            tuning[name] = {
                rate: float(np.mean([study.last(name, rate, seed)[arguments.by] for seed in arguments.tune_seeds]))
                for rate in arguments.rates
            }
            rates[name] = max(tuning[name], key=tuning[name].get)
    study.run_all([(methods[name], name, rates[name], seed) for name in methods for seed in arguments.seeds])
    rows = [study.summary("sft", [study.rows(study.start(seed))[0] for seed in arguments.seeds])]
    for name in methods:
        last = [study.last(name, rates[name], seed) for seed in arguments.seeds]
        rows.append({**study.summary(name, last), "learning_rate": rates[name]})
    result = {
        "seeds": arguments.seeds,
        "tune_seeds": arguments.tune_seeds,
        "rates": rates,
        "tuning": tuning,
        "rows": rows,
    }
    (arguments.output / "ablation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_table(rows, len(arguments.seeds), arguments.iterations)
    return 0


class Study:
    """The runs of a study, each a run directory of the train command under `output`."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.output: Path = arguments.output

    def start(self, seed: int) -> Path:
        """Returns the run directory of a seed's M0 and M1."""
        return self.output / f"seed_{seed}" / "start"

    def directory(self, name: str, rate: str | None, seed: int) -> Path:
        """Returns the run directory of a method with a learning rate on a seed."""
        return self.output / f"seed_{seed}" / (f"{name}_{rate}" if rate else name)

    def starts(self, seeds: Sequence[int]) -> None:
        """Trains M0 and M1 of every seed."""
        jobs = []
        for seed in seeds:
            self.start(seed).parent.mkdir(parents=True, exist_ok=True)
            jobs.append((self.start(seed), [*self._common(seed), "--run.iterations", "0"]))
        self._parallel(jobs)

    def run_all(self, runs: Sequence[tuple[str, str, str | None, int]]) -> None:
        """Trains methods, each from the M1 of its seed.

        Args:
          runs: configuration file, method name, learning rate (None: the configuration's) and seed of each run.
        """
        jobs = []
        for file, name, rate, seed in runs:
            more = ["--config", file, *self._common(seed)[2:], "--run.iterations", str(self.arguments.iterations)]
            more += ["--run.start_from", str(self.start(seed))]
            more += ["--optimise.learning_rate", rate] if rate else []
            jobs.append((self.directory(name, rate, seed), [*self._common(seed)[:2], *more]))
        self._parallel(jobs)

    def rows(self, directory: Path) -> list[dict]:
        """Reads the rows of a run's final table."""
        return json.loads((directory / "summary.json").read_text(encoding="utf-8"))["rows"]

    def last(self, name: str, rate: str | None, seed: int) -> dict:
        """Reads the last row of a run's final table."""
        return self.rows(self.directory(name, rate, seed))[-1]

    def summary(self, name: str, rows: Sequence[dict]) -> dict:
        """Computes the mean and the standard error over seeds of every column that all rows have.

        Args:
          rows: one row per seed.
        """
        result: dict = {"method": name}
        for column in COLUMNS:
            values = [row.get(column) for row in rows]
            if all(v is not None for v in values):
                error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
                result[column] = [float(np.mean(values)), float(error)]
        return result

    def _common(self, seed: int) -> list[str]:
        world = str(self.output / f"seed_{seed}" / "world")
        return [
            *("--config", self.arguments.config, "--world.directory", world, "--world.seed", str(seed)),
            *("--run.seed", str(seed), "--run.compilation_cache", str(self.output / "compiled")),
        ]

    def _parallel(self, jobs: Sequence[tuple[Path, list[str]]]) -> None:
        """Runs what has no summary.json yet; the first failure ends the study after the runs under way."""
        # Each of the runs under way has cores of its own: sharing them costs more than it gives.
        shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for job in range(self.arguments.jobs):
            shares.put(sorted(os.sched_getaffinity(0))[job :: self.arguments.jobs])

        def run(job: tuple[Path, list[str]]) -> None:
            directory, arguments = job
            command = [sys.executable, "-m", "scir_jax.train", *arguments, "--run.directory", str(directory)]
            cores = shares.get()
            try:
                pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
                done = subprocess.run(command, capture_output=True, text=True, preexec_fn=pin)
            finally:
                shares.put(cores)
            if done.returncode:
                raise InputError(f"{directory}: the run failed: {done.stderr.strip().splitlines()[-1]}")
            print(f"{directory}: done", file=sys.stderr, flush=True)

        open_jobs = [job for job in jobs if not (job[0] / "summary.json").exists()]
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(run, open_jobs))


def print_table(rows: Sequence[dict], seeds: int, iterations: int) -> None:
    """Prints one row per method, with the mean and the standard error of every column.

    Args:
      rows: as `Study.summary` makes them.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"after {iterations} iterations, {seeds} seeds, mean ± standard error")
    present = [c for c in COLUMNS if any(c in row for row in rows)]
    for name in ("method", "learning rate", *present):
        table.add_column(name)
    for row in rows:
        cells = [f"{row[c][0]:.3f} ± {row[c][1]:.3f}" if c in row else "-" for c in present]
        table.add_row(row["method"], row.get("learning_rate") or "-", *cells)
    Console(width=220, highlight=False).print(table)


if __name__ == "__main__":
    command.main(main)
