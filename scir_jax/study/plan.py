"""The runs of a study: what each needs, which are finished, and what comes next; tuning decides on the later ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.config.checks import check, resolve
from scir_jax.config.schema import Config
from scir_jax.data.jsonl import read_json, write_json
from scir_jax.errors import InputError
from scir_jax.study.file import Method, Point, Study
from scir_jax.study.tuning import Choice, choose, grown

BEFORE = ("world", "model", "lora", "data", "text", "training", "sft", "generative")
"""sections that decide what M0 and M1 are"""
NOT_COMPARED = ("run", "mesh", "checkpoint")
"""sections that do not decide a run's results, or that the study gives"""
START, TUNE, TABLE, LONGER = "start", "tuning", "table", "longer"
"""kinds of runs: M0 and M1; for choosing a point of the grid; for the table; the same with more iterations"""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A run to be made.

    Attributes:
      kind: START, TUNE, TABLE or LONGER.
      directory: of the run.
      config: whole.
      needs: the start that it goes on from, None for a start.
      method, point, seed: what it is of; a start is of no method.
      decided: the point is that of the tuned method, and not in the place of one that tuning has to find.
    """

    kind: str
    directory: Path
    config: Config
    needs: Job | None
    seed: int
    method: str = ""
    point: Point = ()
    decided: bool = True

    @property
    def iterations(self) -> int:
        """How many iterations the run has."""
        return self.config.run.iterations

    @property
    def title(self) -> str:
        """What a person reads."""
        if self.needs is None:
            return f"{self.kind} {self.directory.parent.name}, seed {self.seed}"
        at = "".join(f" {key}={value}" for key, value in self.point) if self.decided else " as tuning will find"
        return f"{self.kind} {self.method}{at}, seed {self.seed}, {self.iterations} iterations"


class Plan:
    """The runs of a study under a directory, and the records of those that are finished.

    Everything of a run lies beside its directory: DIRECTORY.yaml, its configuration; DIRECTORY.log, what it printed;
    DIRECTORY.json, its record.
    """

    def __init__(self, study: Study, output: Path):
        """
        Args:
          output: absolute.
        """
        self.study = study
        self.output = output
        self._records: dict[Path, dict[str, Any]] = {}
        self._compared: set[Path] = set()
        self._configs: dict[tuple[str, Point], tuple[Config, Config, tuple[str, str]]] = {}
        # Every look at what comes next asks for all jobs.
        self._jobs: dict[tuple[str, str, Point, int, int], Job] = {}

    # --- the runs ---------------------------------------------------------------------------------------------------

    def jobs(self, all_of_them: bool = False) -> list[Job]:
        """Returns the runs in the order in which they are to be made.

        The seeds of the table come one after another, so that what is finished at any time compares all methods on the
        same seeds.

        Args:
          all_of_them: those of methods that are not tuned yet too, at any point of the grid.
        """
        study, runs = self.study, []
        if study.tune_seeds:
            for method in study.methods.values():
                for point in self.points(method):
                    runs += [self.job(TUNE, method, point, seed, study.iterations) for seed in study.tune_seeds]
        choices = {name: self.choice(method) for name, method in study.methods.items()}
        for kind in (TABLE, LONGER):
            for seed in study.seeds:
                for name, method in study.methods.items():
                    iterations = study.iterations if kind == TABLE else method.longer
                    choice = choices[name]
                    if iterations and choice is not None:
                        runs.append(self.job(kind, method, choice.point, seed, iterations))
                    elif iterations and all_of_them:
                        run = self.job(kind, method, method.points()[0], seed, iterations)
                        runs.append(dataclasses.replace(run, decided=False))
        found = {(job.directory, job.iterations): job for run in runs for job in (run.needs, run)}
        return list(found.values())

    def job(self, kind: str, method: Method, point: Point, seed: int, iterations: int) -> Job:
        """Returns a method's run at a point of its grid."""
        key = (kind, method.name, point, seed, iterations)
        if key not in self._jobs:
            self._jobs[key] = self._job(kind, method, point, seed, iterations)
        return self._jobs[key]

    def _job(self, kind: str, method: Method, point: Point, seed: int, iterations: int) -> Job:
        config, base, names = self._configuration(method, point)
        start = self._start(base, names, seed)
        place = ",".join(f"{key}={_plain(value)}" for key, value in point) or "as_it_is"
        directory = self.output / "runs" / method.name / place / f"seed_{seed}"
        config = self._with_run(config, names, directory, seed, iterations, str(start.directory))
        return Job(kind, directory, config, start, seed, method.name, point)

    def _configuration(self, method: Method, point: Point) -> tuple[Config, Config, tuple[str, str]]:
        """Returns a method's configuration at a point, that of its start, and the names of its start and its world."""
        if (method.name, point) not in self._configs:
            config, base = method.at(point), self.study.base
            before = dataclasses.replace(base, **{name: getattr(config, name) for name in BEFORE})
            # How often the judge is asked is no matter of M1.
            generative = dataclasses.replace(before.generative, passes=base.generative.passes)
            before = dataclasses.replace(before, generative=generative)
            names = []
            for sections in (BEFORE, ("world",)):
                ours, theirs = (_digest(content, sections) for content in (before, base))
                names.append("base" if ours == theirs else ours)
            self._configs[method.name, point] = config, before, (names[0], names[1])
        return self._configs[method.name, point]

    def _start(self, config: Config, names: tuple[str, str], seed: int) -> Job:
        """Makes the run that ends with the M1 of all configurations with the same settings before M1."""
        directory = self.output / "starts" / names[0] / f"seed_{seed}"
        config = self._with_run(config, names, directory, seed, 0, config.run.start_from)
        return Job(START, directory, config, None, seed)

    def _with_run(
        self, config: Config, names: tuple[str, str], directory: Path, seed: int, iterations: int, start: str | None
    ) -> Config:
        """Gives a configuration what is the study's to give."""
        run = dataclasses.replace(
            config.run,
            directory=str(directory),
            seed=seed,
            iterations=iterations,
            start_from=start,
            until=None,
            compilation_cache=str(self.output / "compiled"),
        )
        world = config.world
        if world.directory:
            place = self.output / "worlds" / names[1] / f"seed_{seed}"
            world = dataclasses.replace(world, directory=str(place), seed=seed)
        return dataclasses.replace(config, run=run, world=world)

    # --- tuning -----------------------------------------------------------------------------------------------------

    def points(self, method: Method) -> list[Point]:
        """Returns the points of a method's grid, with those by which it has grown so far."""
        return self._tuning(method)[0]

    def choice(self, method: Method) -> Choice | None:
        """Returns what tuning chose for a method; None while runs of its tuning are missing."""
        return self._tuning(method)[1]

    def _tuning(self, method: Method) -> tuple[list[Point], Choice | None]:
        points = method.points()
        if not self.study.tune_seeds:
            return points, Choice((), {}, ())
        found = None
        for growth in range(self.study.extend + 1):
            scores = self._scores(method, points)
            if scores is None:
                return points, None
            found = choose(scores)
            more = [point for point in grown(found) if growth < self.study.extend and self._possible(method, point)]
            if not more:
                break
            points = points + more
        return points, found

    def _possible(self, method: Method, point: Point) -> bool:
        try:
            method.at(point)
        except InputError:
            return False
        return True

    def _scores(self, method: Method, points: list[Point]) -> dict[Point, float] | None:
        """Returns the mean over the tuning seeds of every point's column; None where a run is missing."""
        study, scores = self.study, {}
        for point in points:
            jobs = [self.job(TUNE, method, point, seed, study.iterations) for seed in study.tune_seeds]
            if not all(map(self.finished, jobs)):
                return None
            values = [score(self.record(job), study.by, study.iterations) for job in jobs]
            scores[point] = float(np.mean(values))
        return scores

    # --- records ----------------------------------------------------------------------------------------------------

    def finished(self, job: Job) -> bool:
        """Checks whether a run is finished.

        Raises:
          InputError: it was made with other settings.
        """
        record = self.record(job)
        if not record.get("diverged") and record.get("iterations", -1) < job.iterations:
            return False
        if job.directory not in self._compared:
            if changed := differing(record["settings"], plain(job.config)):
                raise InputError(
                    f"{job.directory}: was made with other settings ({', '.join(changed[:3])}); remove it and the files "
                    "beside it, or take another --output"
                )
            self._compared.add(job.directory)
        return True

    def record(self, job: Job) -> dict[str, Any]:
        """Returns the record of a run, empty before its first attempt.

        It has settings and attempts; `lost`, whether the end of one was not seen; iterations, rows and perhaps costs of
        what is finished; or the sentence `diverged`.
        """
        path = job.directory.with_name(job.directory.name + ".json")
        if path not in self._records:
            self._records[path] = read_json(path) if path.exists() else {}
        return self._records[path]

    def begin(self, job: Job) -> None:
        """Notes that an attempt begins; where one has begun before that did not end, it was lost with its study."""
        record = self.record(job)
        self._write(job, record | {"open": True, "lost": record.get("lost", False) or record.get("open", False)})

    def keep(self, job: Job, attempt: dict[str, Any], more: dict[str, Any]) -> None:
        """Adds an attempt to the record of a run.

        Args:
          attempt: iterations, seconds, processor_seconds, exit code.
          more: what it has found.
        """
        attempts = [*self.record(job).get("attempts", ()), attempt]
        settings = plain(job.config)
        self._write(job, self.record(job) | {"settings": settings, "open": False, "attempts": attempts} | more)

    def _write(self, job: Job, record: dict[str, Any]) -> None:
        path = job.directory.with_name(job.directory.name + ".json")
        write_json(path, record)
        self._records[path] = record

    def next(self, busy: Collection[Path], failed: Collection[Path]) -> Job | None:
        """Returns the next run to be made, or None where nothing can be begun now.

        Args:
          busy, failed: directories of runs that are under way, and that are not to be tried again.
        """
        for job in self.jobs():
            if job.directory in busy or job.directory in failed or self.finished(job):
                continue
            if job.needs is None or self.finished(job.needs):
                return job
        return None

    def check(self) -> None:
        """Checks what can be before the first run.

        Raises:
          InputError: settings of a start contradict each other, or the directory has runs of other settings.
        """
        for job in self.jobs(all_of_them=True):
            if job.needs is None:
                check(resolve(job.config))
            if job.decided:
                self.finished(job)


def score(record: dict[str, Any], column: str, iterations: int) -> float:
    """Returns a column of a run's model after some iterations, -inf where the run diverged or lacks the column."""
    rows = record.get("rows") or [{}]
    value = rows[: iterations + 1][-1].get(column)
    return -np.inf if value is None else float(value)


def plain(config: Config) -> dict[str, Any]:
    """Returns the configuration as JSON would read it back: tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the settings that differ between two configurations of the same run, as mappings, by dotted key.

    Places of files that the study chooses, and what changes no result, do not count.
    """
    found = []
    for section in before.keys() | now.keys():
        one, other = before.get(section, {}), now.get(section, {})
        if section not in NOT_COMPARED:
            found += [f"{section}.{key}" for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    return sorted(set(found) - {"world.directory"})


def _digest(config: Config, sections: Collection[str]) -> str:
    content = {name: values for name, values in plain(config).items() if name in sections}
    content.get("world", {}).update(directory=None, seed=None)
    if "generative" in content:
        del content["generative"]["passes"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _plain(value: Any) -> str:
    text = (
        json.dumps(value)
        if not isinstance(value, (str, float))
        else f"{value:g}"
        if isinstance(value, float)
        else value
    )
    return "".join(c if c.isalnum() or c in "._-+" else "_" for c in text)
