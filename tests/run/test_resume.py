"""Runs that are killed or stopped anywhere go on to the very result of a run that is left alone.

A run is interrupted at one place, goes on, is interrupted at the next place, and so on to its end: what an interruption
leaves behind must neither hinder those that follow nor show in the result.
"""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

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
RESPONSES, HELDOUT = "scir_jax.run.sampling:sample_rows", "scir_jax.run.evaluation:sample_rows"
SCORES, JUDGE = "scir_jax.run.scoring:score_answers", "scir_jax.run.scoring:judge_pairs"
PAIRS = "scir_jax.run.pairing:write_rows"


class Kill(NamedTuple):
    """A place where a run is killed.

    Attributes:
      newest: of RESULTS, the last that is there then.
      place, call, when: see Strike.
    """

    newest: str | None
    place: str
    call: int | tuple = 1
    when: str = "before"
    number: int = signal.SIGKILL

    def check(self, directory: Path, code: int, err: str) -> None:
        """Checks how the process ended."""
        assert code == -self.number, (code, err)


class Stop(NamedTuple):
    """A place where a run is stopped by a signal.

    Attributes:
      newest, place, call, when: see Kill.
      where: what it says of it; None where a second signal stopped it at once.
      steps: those of the whole run that are done then, the last of a stage's with a checkpoint; None outside training.
    """

    newest: str | None
    number: int
    place: str
    call: int | tuple = 1
    when: str = "before"
    where: str | None = None
    steps: int | None = None

    def check(self, directory: Path, code: int, err: str) -> None:
        """Checks how the process ended, and what it said."""
        assert code == 128 + self.number, (code, err)
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


# SFT and both iterations have 6 steps each, with checkpoints after 2 and 4, which are saved while training goes on: of
# a run that is killed just then they may be there or not. A checkpoint is committed in three parts, a model in one.
SOME = [
    Kill("M0", COMMIT, 2),  # M0 is the first that is committed
    Kill("pairs 1", WRITE, ("optimise", 1, 2), "after"),
    Stop("pairs 1", signal.SIGTERM, WRITE, ("optimise", 1, 3), where="iteration 1: optimise", steps=6 + 4),
    Stop("pairs 2", signal.SIGTERM, WRITE, ("optimise", 2, 4), "twice"),
]
CHAINS = {
    "SFT": [
        Kill(None, "scir_jax.run.directory:RunDirectory.check_manifest"),
        Kill(None, STORE, (0,)),
        Kill("M0", WRITE, ("sft", 0, 1)),
        Kill("M0", WRITE, ("sft", 0, 2), "after"),
        Kill("M0", COMMIT, 1),
        Kill("M0", COMMIT, 3),
        Kill("M0", WRITE, ("sft", 0, 3)),
        Kill("M0", WRITE, ("sft", 0, 4), "after"),
        Kill("M0", STORE, (1,)),
        Kill("M1", STORE, (1,), "after"),
    ],
    "sampling and pairs": [
        Kill("M1", "scir_jax.run.evaluation:response_metrics"),
        Kill("evaluation of M1", RESPONSES, 1),
        Kill("evaluation of M1", RESPONSES, 2),
        Kill("responses 1", SCORES, 2),
        Kill("responses 1", PAIRS),
        Kill("pairs 1", PAIRS, 1, "after"),
    ],
    "optimise to report": [
        Kill("pairs 1", WRITE, ("optimise", 1, 1)),
        Kill("pairs 1", SAVE, (2,)),
        Kill("pairs 1", COMMIT, 2),
        Kill("pairs 1", COMMIT, 3),
        Kill("pairs 1", SAVE, (2,), "after"),
        Kill("pairs 1", WRITE, ("optimise", 1, 3), "after"),
        Kill("pairs 1", COMMIT, 2),
        Kill("pairs 1", SAVE, (4,), "after"),
        Kill("M2", HELDOUT, 2),
        Kill("pairs 2", WRITE, ("optimise", 2, 5)),
        Kill("M3", "scir_jax.run.evaluation:decision_metrics"),
        Kill("summary", "scir_jax.model.hf.weights:save_file", 1, "after"),
        Kill("export", "scir_jax.report.page:write_report"),
    ],
    "stops": [
        Stop("M0", signal.SIGINT, STORE, (0,), where="start-up"),
        Stop("M0", signal.SIGTERM, SAVE, (2,), where="SFT", steps=3),
        Stop("M0", signal.SIGINT, WRITE, ("sft", 0, 4), where="SFT", steps=5),
        Stop("M1", signal.SIGTERM, JUDGE, where="evaluation of M1"),
        Stop("evaluation of M1", signal.SIGINT, RESPONSES, where="iteration 1: sample"),
        Stop("responses 1", signal.SIGTERM, SCORES, 2, where="iteration 1: pair and score"),
        Stop("M2", signal.SIGINT, HELDOUT, 2, where="evaluation of M2"),
    ],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A directory that all processes of pytest use."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "resume"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def command(tiny_config, world_dir, shared, tmp_path_factory):
    """command(directory, strike) -> an interpreter's arguments, and the environment, of a run."""
    config = tiny_config(
        world_dir,
        run=dict(iterations=2, tensorboard=True, compilation_cache=str(shared / "compiled")),
        world=dict(directory=None),
        sft=dict(epochs=2.0),
        sample=dict(responses=3, prompts=8, batch_size=4),
        optimise=dict(epochs=3),
        evaluate=dict(greedy=False, samples=3, grader="scir_jax.world.grader:grade"),
    )
    file = tmp_path_factory.mktemp("resume") / "tiny.yaml"
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
        if path.name != "seconds.json":
            result[str(path.relative_to(directory))] = path.read_bytes()
    result["export"] = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((directory / "export").iterdir())
    }
    result["metrics"] = [without_times(row) for row in lines(directory / "metrics.jsonl")]
    result["summary"] = [without_times(row) for row in content(directory / "summary.json")["rows"]]
    result["names"] = sorted(p.name for p in directory.iterdir() if p.name != "tensorboard")
    result["checkpoints"] = sorted(p.name for p in (directory / "checkpoints").iterdir())
    return result


@pytest.fixture(scope="module")
def expected(command, shared):
    """The result of a run that is left alone, in an interpreter of its own; once for all processes of pytest."""
    directory, file = shared / "run", shared / "result"
    with FileLock(shared / "lock"):
        if not file.exists():
            arguments, env = command(directory, Strike())
            done = subprocess.run(
                [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=ROOT, timeout=600
            )
            assert done.returncode == 0, done.stderr
            file.write_bytes(pickle.dumps(result_of(directory)))
    result = pickle.loads(file.read_bytes())
    assert [row["step"] for row in result["metrics"]] == list(range(1, 19))
    assert [row["stage"] for row in result["metrics"]] == ["sft"] * 6 + ["optimise"] * 12
    return result


def newest(directory: Path) -> str | None:
    """The last of a run's results that is there; those before it are."""
    found = [name for name, path in RESULTS.items() if (directory / path).exists()]
    assert found == list(RESULTS)[: len(found)]
    return found[-1] if found else None


@pytest.mark.parametrize(
    "chain",
    [pytest.param(SOME, id="some"), *(pytest.param(c, id=name, marks=pytest.mark.slow) for name, c in CHAINS.items())],
)
def test_interrupted_again_and_again(chain, run, expected, tmp_path):
    directory = tmp_path / "run"
    for one in chain:
        code, err = run(directory, Strike(one.place, one.call, one.when, one.number, ahead=False))
        one.check(directory, code, err)
        assert newest(directory) == one.newest, one
    code, err = run(directory, Strike())
    assert code == 0, err
    found = result_of(directory)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
