"""A study file: what is compared, on which seeds, how it is tuned; checked before anything runs.

base: quickstart                        # configurations and settings that all runs have
methods:                                # name: files and settings laid over the base, a later one wins
  srlm: methods/srlm
  half: [methods/scir, {consistency: {weight: 0.5}}]
seeds: [0, 1, 2, 3]                     # of the table: run.seed, and world.seed where there is a world
iterations: 4
longer: {half: 10}                      # more iterations of these methods, after all else
tuning:
  seeds: [100, 101]                     # others than those of the table
  grid: {optimise.learning_rate: [5e-5, 1e-4, 2e-4]}
  grids: {half: {...}}                  # a grid of its own for a method, with as many points
  budget: 6                             # runs per method, points times seeds: checked
  extend: 2                             # how often a grid may grow where its edge wins; 0
by: quality                             # the column that chooses
against: srlm                           # the method that all others are compared with, or method: other one
oracle: oracle                          # the ceiling, for the share of the way; several for several M1
jobs: 1                                 # runs at the same time
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from scir_jax.config import cli, names
from scir_jax.config.checks import check, resolve
from scir_jax.config.files import find, find_study, read
from scir_jax.config.schema import Config
from scir_jax.errors import InputError
from scir_jax.run.columns import KEYS as COLUMNS

REQUIRED = ("methods", "seeds", "iterations", "against")
KNOWN = (*REQUIRED, "base", "longer", "tuning", "by", "oracle", "jobs")
TUNING = ("seeds", "grid", "grids", "budget", "extend")
OF_THE_STUDY = (
    *("run.directory", "run.seed", "run.iterations", "run.start_from", "run.until", "run.auto"),
    *("run.compilation_cache", "world.seed", "world.directory"),
)
"""settings that the study gives every run"""
NEUTRAL = ("verdict_mass", "length", "entropy", "kl", "eos_rate", "seconds", "selected")
"""columns of which more is neither better nor worse"""
SECTIONS = tuple(field.name for field in dataclasses.fields(Config))

Point = tuple[tuple[str, Any], ...]
"""a point of a grid: (key, value) of each key"""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of a study.

    Attributes:
      name: in the tables, and of its directory.
      config: the base with the method's files and settings laid over it.
      grid: (key, values) of what is tuned; () without tuning.
      longer: iterations of the longer runs, None where there are none.
    """

    name: str
    config: Config
    grid: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    longer: int | None = None

    def points(self) -> list[Point]:
        """Returns all points of the grid."""
        return [tuple(zip((key for key, _ in self.grid), values)) for values in itertools.product(*self._values())]

    def at(self, point: Point) -> Config:
        """Returns the method's configuration at a point.

        Raises:
          InputError: settings contradict each other there.
        """
        config = self.config
        for key, value in point:
            config = replaced(config, key, value)
        check(resolve(config))
        return config

    def _values(self) -> Iterator[tuple[Any, ...]]:
        return (values for _, values in self.grid)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study file as it was read, with what the command line says instead.

    Attributes:
      name: the file's, without directory and suffix.
      text: of the file.
      base: configuration of all runs.
      extend: how often a grid may grow where its edge wins.
      against: method -> the one that it is compared with.
      oracles: methods that are ceilings, each for those with the same M1.
    """

    name: str
    text: str
    base: Config
    methods: dict[str, Method]
    seeds: tuple[int, ...]
    iterations: int
    tune_seeds: tuple[int, ...]
    extend: int
    by: str
    against: dict[str, str]
    oracles: tuple[str, ...]
    jobs: int


def read_study(name: str, **instead: Any) -> Study:
    """Reads a study file.

    Args:
      name: a path, or a name like "studies/quick" of one that comes with the package.
      instead: values of seeds, iterations, jobs, against that stand for those of the file, and methods, the names of
        those that take part; None leaves the file's.

    Raises:
      InputError: one sentence with the file, the key, and what to do.
    """
    file = find_study(name)
    text = file.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not a YAML file: {' '.join(str(error).split())}") from None
    try:
        return _study(file.stem, text, _mapping(content, "a study"), instead)
    except InputError as error:
        raise InputError(f"{file}: {str(error).replace('unknown option --', 'unknown key ')}") from None


def replaced(config: Any, key: str, value: Any) -> Any:
    """Returns a configuration with one setting of another value.

    Args:
      key: dotted.
      value: of the setting's type.
    """
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), rest, value) if rest else value})


def _study(name: str, text: str, content: dict[str, Any], instead: Mapping[str, Any]) -> Study:
    for key in content:
        if key not in KNOWN:
            raise InputError(f"unknown key {key!r}{names.nearest(str(key), KNOWN)}")
    given = {key: value for key, value in instead.items() if value is not None and key != "methods"}
    defaults: dict[str, Any] = {"base": "quickstart", "by": "quality", "jobs": 1, "longer": {}, "tuning": {}}
    content = defaults | content | given
    for key in REQUIRED:
        if content.get(key) is None:
            raise InputError(f"{key} is missing; a study says {', '.join(REQUIRED)}")
    every, longer, tuning = (_mapping(content[key], key) for key in ("methods", "longer", "tuning"))
    chosen = list(instead.get("methods") or every)
    for part, asked in (("--methods", chosen), ("longer", longer), ("tuning.grids", _grids(tuning))):
        _known(part, asked, every)
    iterations = _whole(content["iterations"], "iterations", 1)
    for method, number in longer.items():
        _whole(number, f"longer.{method}", iterations + 1)
    oracle = content.get("oracle", [name for name in ("oracle",) if name in every])
    oracles: list[str] = oracle if isinstance(oracle, list) else [oracle]
    _known("oracle", oracles, every)
    against = content["against"]
    if not isinstance(against, dict):
        against = {method: against for method in chosen if method != against} or {against: against}
    _known("against", [*against, *against.values()], every)
    against = {method: other for method, other in against.items() if method in chosen}
    _known("against", [*against.values()], chosen)
    seeds = _seeds(content["seeds"], "seeds")
    tune_seeds, grids, extend = _tuning(tuning, chosen)
    if both := sorted(set(seeds) & set(tune_seeds)):
        raise InputError(f"seeds and tuning.seeds share {both[0]}: the table would show what was tuned on; take others")
    if content["by"] not in COLUMNS or content["by"] in NEUTRAL:
        better = [column for column in COLUMNS if column not in NEUTRAL]
        raise InputError(f"by is {content['by']!r}; it is a column of which more is better: {', '.join(better)}")
    base_layers = _layers(content["base"], "base")
    base = _laid_over("base", Config(), [], base_layers)
    if base.run.auto:
        raise InputError(
            "base: run.auto proposes settings for each run anew; give settings, or {run.auto: false} over a run's config.yaml"
        )
    methods = {}
    for method in chosen:
        where = f"methods.{method}"
        if not method.replace("_", "").replace("-", "").isalnum() or method == "sft":
            raise InputError(
                f"{where}: a name is letters, digits, _ and -, and not sft, which names M1; take another one"
            )
        layers = _layers(every[method], where)
        _refuse_the_studys_own(where, layers)
        config = _laid_over(where, base, base_layers, layers)
        found = Method(method, config, _typed(grids[method]), longer.get(method))
        for point in found.points():
            try:
                found.at(point)
            except InputError as error:
                at = "".join(f" at {key}={value}" for key, value in point)
                raise InputError(f"{where}{at}: {error}") from None
        methods[method] = found
    return Study(
        name=name, text=text, base=base, methods=methods, seeds=seeds, iterations=iterations, tune_seeds=tune_seeds,
        extend=extend, by=content["by"], against=against, oracles=tuple(name for name in oracles if name in chosen),
        jobs=_whole(content["jobs"], "jobs", 1),
    )  # fmt: skip


def _tuning(tuning: dict[str, Any], methods: Sequence[str]) -> tuple[tuple[int, ...], dict[str, dict], int]:
    """Checks the section tuning -> its seeds, the grid of every method, how often a grid may grow."""
    for key in tuning:
        if key not in TUNING:
            raise InputError(f"unknown key 'tuning.{key}'{names.nearest(str(key), TUNING)}")
    if not tuning:
        return (), {method: {} for method in methods}, 0
    seeds = _seeds(tuning.get("seeds"), "tuning.seeds")
    own = _grids(tuning)
    grids, runs = {}, {}
    for method in methods:
        where = f"tuning.grids.{method}" if method in own else "tuning.grid"
        grids[method] = _mapping(own.get(method, tuning.get("grid") or {}), where)
        if not grids[method] or any(not isinstance(v, list) or not v for v in grids[method].values()):
            raise InputError(f"{where} is empty or no lists; give each key the values to choose from")
        for key in grids[method]:
            if key not in (known := names.fields(SECTIONS)):
                raise InputError(f"{where}: unknown key {key!r}{names.nearest(key, known)}")
            if key in OF_THE_STUDY:
                raise InputError(f"{where}: {key} is given by the study; leave it out")
        points = list(itertools.product(*grids[method].values()))
        if len({str(point) for point in points}) < len(points):
            raise InputError(f"{where} names a value twice; leave one of them out")
        runs[method] = len(points) * len(seeds)
    budget = _whole(tuning.get("budget", runs[methods[0]]), "tuning.budget", 1)
    for method, number in runs.items():
        if number != budget:
            raise InputError(
                f"tuning: the grid of {method} makes {number} runs, and every method has {budget}; give it another one in "
                f"tuning.grids.{method}, or another tuning.budget"
            )
    return seeds, grids, _whole(tuning.get("extend", 0), "tuning.extend", 0)


def _grids(tuning: dict[str, Any]) -> dict[str, Any]:
    return _mapping(tuning.get("grids") or {}, "tuning.grids")


def _typed(grid: Mapping[str, Sequence[Any]]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Reads the values of a grid as their settings' types."""
    return tuple((key, tuple(_value(key, json.dumps(value)) for value in values)) for key, values in grid.items())


@functools.lru_cache
def _value(key: str, text: str) -> Any:
    value = json.loads(text)
    found = cli.parse("ablate", "", cli.arguments({key: value}), sections=(key.partition(".")[0],))[0]
    return functools.reduce(getattr, key.split("."), found)


def _layers(value: Any, where: str) -> list[str | dict]:
    """Returns names of files and mappings of settings, of one of them or a list."""
    layers = value if isinstance(value, list) else [value]
    for layer in layers:
        if not isinstance(layer, (str, dict)):
            raise InputError(f"{where} must be names of configurations and mappings of settings, not {layer!r}")
    return layers


def _laid_over(where: str, config: Config, below: Sequence[str | dict], layers: Sequence[str | dict]) -> Config:
    """Lays settings over a configuration; only sections that they touch are read anew, which is quick.

    Args:
      below: the layers that `config` was made of.
    """
    try:
        contents = [read(find(layer)) if isinstance(layer, str) else layer for layer in layers]
        touched = {str(key).partition(".")[0] for content in contents for key in content}
        sections = [name for name in SECTIONS if name in touched]
        if touched - set(sections):
            sections = list(SECTIONS)  # there is an unknown key: it is to be compared with all
        if not sections:
            return config
        # Files may have other sections, options may not.
        below = [
            {key: value for key, value in layer.items() if str(key).partition(".")[0] in sections}
            if isinstance(layer, dict)
            else layer
            for layer in below
        ]
        found = _line(tuple(_arguments([*below, *layers])), tuple(sections))
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('--config ')}") from None
    return dataclasses.replace(config, **{name: getattr(found, name) for name in sections})


@functools.lru_cache(maxsize=256)
def _line(argv: tuple[str, ...], sections: tuple[str, ...]) -> Config:
    return cli.parse("ablate", "", argv, sections=sections)[0]


def _arguments(layers: Sequence[str | dict]) -> list[str]:
    result = []
    for layer in layers:
        result += ["--config", str(find(layer))] if isinstance(layer, str) else cli.arguments(layer)
    return result


def _refuse_the_studys_own(where: str, layers: Sequence[str | dict]) -> None:
    try:
        given = names.given(_arguments(layers), SECTIONS)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('--config ')}") from None
    if own := sorted(given & set(OF_THE_STUDY)):
        raise InputError(f"{where}: {own[0]} is given by the study; leave it out")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a mapping of keys, not {'empty' if value is None else repr(value)}")
    return {str(key): inner for key, inner in value.items()}


def _known(where: str, asked: Sequence[str] | Mapping[str, Any], methods: Sequence[str] | Mapping[str, Any]) -> None:
    for name in asked:
        if name not in methods:
            raise InputError(f"{where}: no method {name!r} takes part; there are {', '.join(methods)}")


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = value if isinstance(value, (list, tuple)) else []
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise InputError(f"{where} must be a list of different seeds, as in [0, 1, 2], not {value!r}")
    return tuple(seeds)


def _whole(value: Any, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{where} must be a whole number of at least {least}, not {value!r}")
    return value
