"""Runs that are killed or stopped anywhere go on to the very result of a run that is left alone.

A run is interrupted at one place, goes on, is interrupted at the next place, and so on to its end: what an interruption
leaves behind must neither hinder those that follow nor show in the result.
"""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from scir_jax.config.files import to_yaml
from scir_jax.run.training import TIMINGS
from tests.forks import ROOT, Fork, environment, quick
from tests.run.runs import content, lines
from tests.strikes import COMMIT, SAVE, STORE, WRITE, Strike

# What a run makes, in order.
RESULTS = {
    "M0": "checkpoints/M0",
    "M1": "checkpoints/M1",
    "evaluation of M1": "iteration_00/evaluation.json",
    "responses 1": "iteration_01/responses.jsonl",
    "pairs 1": "iteration_01/pairs.jsonl",
    "M2": "checkpoints/M2",
    "evaluation of M2": "iteration_01/evaluation.json",
    "responses 2": "iteration_02/responses.jsonl",
    "pairs 2": "iteration_02/pairs.jsonl",
    "M3": "checkpoints/M3",
    "evaluation of M3": "iteration_02/evaluation.json",
    "summary": "summary.json",
    "export": "export",
    "report": "report.html",
}
RESPONSES, HELDOUT = "scir_jax.run.sampling:_keep", "scir_jax.run.sampling:finished_rows"
SCORES, JUDGE = "scir_jax.run.scoring:score_answers", "scir_jax.run.scoring:judge_pairs"
PAIRS = "scir_jax.run.pairing:write_rows"


class Interruption(NamedTuple):
    """A place where a run is interrupted.

    Attributes:
      newest: of RESULTS, the last that is there then.
      where: what a run that is stopped says of it; None where a second signal ends it at once.
      steps: those of the whole run that are done then, with a checkpoint of the last; None where it is not stopped in
        training.
    """

    newest: str | None
    strike: Strike
    where: str | None = None
    steps: int | None = None

    def check(self, directory: Path, code: int, err: str) -> None:
        """Checks how the process ended, what it said and what it left."""
        number = self.strike.signal
        killed = number == signal.SIGKILL
        assert code == (-number if killed else 128 + number), (code, err)
        assert newest(directory) == self.newest, err
        if killed:
            return
        assert "Traceback" not in err
        last = err.strip().splitlines()[-1]
        if self.where is None:
            assert last == "stopped at once; run the same command again to go on from the last checkpoint"
        else:
            assert last == f"stopped in {self.where}; everything is saved: run the same command again to go on"
        if self.steps:
            assert [row["step"] for row in lines(directory / "metrics.jsonl")] == list(range(1, self.steps + 1))
            stage, step = ("iteration_01", self.steps - 6) if self.steps > 6 else ("sft", self.steps)
            assert (directory / "checkpoints" / stage / str(step)).is_dir()


def kill(newest: str | None, place: str, call: int | tuple = 1, when: str = "before") -> Interruption:
    return Interruption(newest, Strike(place, call, when, ahead=False))


def stop(
    newest: str | None, number: int, place: str, call: int | tuple = 1, when: str = "before", **said
) -> Interruption:
    return Interruption(newest, Strike(place, call, when, number, ahead=False), **said)


# SFT and both iterations have 6 steps each, with checkpoints after 2 and 4, which are saved while training goes on: of
# a run that is killed just then they may be there or not. A checkpoint is committed in three parts, a model in one.
INTERRUPTIONS = [
    kill(None, "scir_jax.run.directory:RunDirectory.check_manifest"),
    kill(None, STORE, (0,)),
    stop("M0", signal.SIGINT, STORE, (0,), where="start-up"),
    kill("M0", WRITE, ("sft", 0, 2), "after"),
    kill("M0", COMMIT, 1),
    stop("M0", signal.SIGTERM, SAVE, (2,), where="SFT", steps=3),
    kill("M0", COMMIT, 3),
    kill("M0", WRITE, ("sft", 0, 4), "after"),
    stop("M0", signal.SIGINT, WRITE, ("sft", 0, 5), where="SFT", steps=5),
    kill("M0", STORE, (1,)),
    kill("M1", STORE, (1,), "after"),
    kill("M1", "scir_jax.run.evaluation:response_metrics"),
    stop("M1", signal.SIGTERM, JUDGE, where="evaluation of M1"),
    kill("evaluation of M1", RESPONSES, 1),
    kill("evaluation of M1", RESPONSES, 2),
    stop("evaluation of M1", signal.SIGINT, RESPONSES, where="iteration 1: sample"),
    kill("responses 1", SCORES, 2),
    stop("responses 1", signal.SIGTERM, SCORES, 2, where="iteration 1: pair and score"),
    kill("responses 1", PAIRS),
    kill("pairs 1", PAIRS, 1, "after"),
    kill("pairs 1", WRITE, ("optimise", 1, 1)),
    kill("pairs 1", COMMIT, 2),
    kill("pairs 1", COMMIT, 3),
    kill("pairs 1", SAVE, (2,), "after"),
    kill("pairs 1", WRITE, ("optimise", 1, 3), "after"),
    stop("pairs 1", signal.SIGTERM, WRITE, ("optimise", 1, 3), where="iteration 1: optimise", steps=6 + 3),
    kill("pairs 1", SAVE, (4,), "after"),
    kill("M2", HELDOUT, 2),
    stop("M2", signal.SIGINT, HELDOUT, 2, where="evaluation of M2"),
    stop("pairs 2", signal.SIGTERM, WRITE, ("optimise", 2, 4), "twice"),
    kill("pairs 2", WRITE, ("optimise", 2, 5)),
    kill("M3", "scir_jax.run.evaluation:decision_metrics"),
    kill("summary", "scir_jax.model.hf.weights:save_file", 1, "after"),
    kill("export", "scir_jax.report.page:write_report"),
]


@pytest.fixture
def command(tiny_config, world_dir, tmp_path):
    """command(directory, strike) -> an interpreter's arguments, and the environment, of a run."""
    config = tiny_config(
        world_dir,
        run=dict(iterations=2, tensorboard=True, compilation_cache=str(tmp_path / "compiled")),
        world=dict(directory=None),
        sft=dict(epochs=2.0),
        sample=dict(responses=3, prompts=8, batch_size=4),
        optimise=dict(epochs=3),
        evaluate=dict(greedy=False, samples=3, grader="scir_jax.world.grader:grade"),
    )
    file = tmp_path / "tiny.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    env = environment(**quick())
    return lambda directory, strike: ([*strike.command, "--config", file, "--run.directory", directory], env)


@pytest.fixture
def run(command, tmp_path) -> Callable[..., tuple[int, str]]:
    """run(directory, strike) -> (exit code, stderr) of a process."""

    def start(directory: Path, strike: Strike) -> tuple[int, str]:
        arguments, env = command(directory, strike)
        out, err = tmp_path / "out", tmp_path / "err"
        process = Fork(arguments, env=env, cwd=ROOT, out=out, err=err)
        try:
            return process.wait(300), err.read_text(errors="replace")
        finally:
            process.kill()

    return start


def without_times(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in TIMINGS}


def arrays(directory: Path) -> dict[str, bytes]:
    """The parameters of every model, by name."""
    import jax
    from orbax.checkpoint import v1 as ocp

    result = {}
    for model in sorted(directory.glob("checkpoints/M*")):
        for path, value in jax.tree_util.tree_flatten_with_path(ocp.load(model))[0]:
            result[model.name + jax.tree_util.keystr(path)] = jax.device_get(value).tobytes()
    return result


def result_of(directory: Path) -> dict:
    """All that a run makes, but for times."""
    result = {"arrays": arrays(directory)}
    for path in sorted(directory.glob("iteration_*/*")):
        if path.name not in ("seconds.json", "memory.json"):
            result[str(path.relative_to(directory))] = path.read_bytes()
    result["export"] = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((directory / "export").iterdir())
    }
    result["metrics"] = [without_times(row) for row in lines(directory / "metrics.jsonl")]
    summary = content(directory / "summary.json")
    result["summary"] = [without_times(row) for row in summary["rows"]]
    result["costs"] = [without_times(row) | {"memory": None, "memory_of": None} for row in summary["costs"]["stages"]]
    result["names"] = sorted(p.name for p in directory.iterdir() if p.name != "tensorboard")
    result["checkpoints"] = sorted(p.name for p in (directory / "checkpoints").iterdir())
    return result


@pytest.fixture
def expected(command, tmp_path) -> dict:
    """The result of a run that is left alone, in an interpreter of its own."""
    arguments, env = command(tmp_path / "alone", Strike())
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "alone")
    assert [row["step"] for row in result["metrics"]] == list(range(1, 19))
    assert [row["stage"] for row in result["metrics"]] == ["sft"] * 6 + ["optimise"] * 12
    return result


def newest(directory: Path) -> str | None:
    """The last of a run's results that is there; those before it are."""
    found = [name for name, path in RESULTS.items() if (directory / path).exists()]
    assert found == list(RESULTS)[: len(found)]
    return found[-1] if found else None


@pytest.mark.slow
def test_interrupted_again_and_again(run, expected, tmp_path):
    directory = tmp_path / "run"
    for one in INTERRUPTIONS:
        one.check(directory, *run(directory, one.strike))
    code, err = run(directory, Strike())
    assert code == 0, err
    found = result_of(directory)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
