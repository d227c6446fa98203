"""Runs that are killed or stopped anywhere go on to the very result of a run that is left alone."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scir_jax.config import cli
from scir_jax.config.files import to_yaml
from scir_jax.run.training import TIMINGS

# Runs the training command; before the n-th call of a function the process gets a signal.
DRIVER = """
import importlib, os, sys
place, count, number, when = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
sys.argv = ["train", *sys.argv[5:]]
if count:
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0
    def struck(*arguments, **keywords):
        global calls
        calls += 1
        if calls == count and when != "after":
            os.kill(os.getpid(), number)
            if when == "twice":
                os.kill(os.getpid(), number)
        result = function(*arguments, **keywords)
        if calls == count and when == "after":
            os.kill(os.getpid(), number)
        return result
    setattr(owner, name, struck)
from scir_jax.config import cli
from scir_jax import train
command.main(train.main)
"""

# SFT and both iterations have 6 steps each, with checkpoints after 2 and 4.
WRITE, SAVE = "scir_jax.run.metrics:Metrics.write", "scir_jax.engine.checkpoint:StageCheckpoints.save"
STORE = "scir_jax.engine.checkpoint:ModelStore.save"
COMMIT = "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize"
ROWS, JSON = "scir_jax.data.records:write_rows", "scir_jax.data.records:write_json"

KILLS = {
    "start": [("scir_jax.run.directory:RunDirectory.check_manifest", 1, "before")],
    "saving M0": [(STORE, 1, "before")],
    "SFT, first step": [(WRITE, 1, "before")],
    "SFT, between checkpoints": [(WRITE, 4, "after")],
    "SFT, saving M1": [(STORE, 2, "before")],
    "SFT, M1 saved": [(STORE, 2, "after")],
    "evaluation of M1": [("scir_jax.run.evaluation:response_metrics", 1, "before")],
    "sampling, first batch": [("scir_jax.run.sampling:sample_rows", 4, "before")],
    "sampling, between batches": [("scir_jax.run.sampling:sample_rows", 6, "before")],
    "references": [("scir_jax.run.scoring:response_logps", 4, "before")],
    "writing pairs": [(ROWS, 2, "before")],
    "pairs written": [(ROWS, 2, "after")],
    "optimise, between checkpoints": [(WRITE, 6 + 2, "after")],
    "optimise, just after a checkpoint": [(SAVE, 3, "after")],
    "optimise, saving": [(SAVE, 3, "before")],
    "checkpoint of SFT not committed": [(COMMIT, 2, "before")],
    "checkpoint of optimise not committed": [(COMMIT, 5, "before")],
    "second iteration": [(WRITE, 6 + 6 + 5, "before")],
    "evaluation of M3": [("scir_jax.run.evaluation:decision_metrics", 2, "before")],
    "export": [("scir_jax.model.hf.weights:save_file", 1, "after")],
    "report": [("scir_jax.report.page:write_report", 1, "before")],
    "again and again": [(WRITE, 2, "after"), (WRITE, 3, "before"), (SAVE, 3, "after"), (WRITE, 3, "after"), (COMMIT, 2, "after")],
}  # fmt: skip
FAST = ("optimise, between checkpoints", "checkpoint of SFT not committed")


@pytest.fixture(scope="module")
def environment(compiled_directory):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def run(tiny_config, world_dir, compiled_directory, environment, tmp_path_factory):
    """run(directory, place, count, when, number) -> the finished process."""
    config = tiny_config(
        world_dir,
        run=dict(iterations=2, tensorboard=True, compilation_cache=str(compiled_directory)),
        world=dict(directory=None),
        sft=dict(epochs=2.0),
        sample=dict(responses=3, prompts=8, batch_size=4),
        optimise=dict(epochs=3),
        evaluate=dict(greedy=False, grader="scir_jax.world.grader:grade"),
    )
    file = tmp_path_factory.mktemp("resume") / "tiny.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")

    def start(directory, place="", count=0, when="before", number=signal.SIGKILL):
        arguments = [
            place or "-",
            str(count),
            str(int(number)),
            when,
            "--config",
            str(file),
            "--run.directory",
            str(directory),
        ]
        return subprocess.run(
            [sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, env=environment, timeout=300
        )

    return start


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


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
    result["metrics"] = [without_times(row) for row in rows_of(directory / "metrics.jsonl")]
    result["summary"] = [without_times(row) for row in json.loads((directory / "summary.json").read_text())["rows"]]
    result["names"] = sorted(p.name for p in directory.iterdir() if p.name != "tensorboard")
    result["checkpoints"] = sorted(p.name for p in (directory / "checkpoints").iterdir())
    return result


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(directory)
    assert done.returncode == 0, done.stderr
    result = result_of(directory)
    assert [row["step"] for row in result["metrics"]] == list(range(1, 19))
    assert [row["stage"] for row in result["metrics"]] == ["sft"] * 6 + ["optimise"] * 12
    return result


def check(directory: Path, expected: dict) -> None:
    found = result_of(directory)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


def cases():
    return [pytest.param(name, id=name, marks=[] if name in FAST else [pytest.mark.slow]) for name in KILLS]


@pytest.mark.parametrize("name", cases())
def test_killed_and_run_again(name, run, expected, tmp_path):
    directory = tmp_path / "run"
    for place, count, when in KILLS[name]:
        done = run(directory, place, count, when)
        assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)
        assert not (directory / "summary.json").exists() or name in ("export", "report")
    done = run(directory)
    assert done.returncode == 0, done.stderr
    check(directory, expected)


@pytest.mark.parametrize(
    "number, place, count",
    [
        (signal.SIGTERM, WRITE, 6 + 3),
        pytest.param(signal.SIGINT, WRITE, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, SAVE, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "scir_jax.run.sampling:sample_rows", 6, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "scir_jax.run.scoring:response_logps", 4, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "scir_jax.run.scoring:judge_pairs", 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, STORE, 1, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_run_again(number, place, count, run, expected, tmp_path):
    directory = tmp_path / "run"
    done = run(directory, place, count, "before", number)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "everything is saved" in last and "run the same command again" in last
    if place == WRITE:
        stage = "sft" if count <= 6 else "iteration_01"
        written = len(rows_of(directory / "metrics.jsonl"))
        assert (directory / "checkpoints" / stage / str(written - (6 if count > 6 else 0))).is_dir()
    again = run(directory)
    assert again.returncode == 0, again.stderr
    check(directory, expected)


def test_stopped_twice_ends_at_once(run, tmp_path):
    """The second signal waits for nothing; no traceback is shown, and the run goes on from what was saved."""
    directory = tmp_path / "run"
    done = run(directory, WRITE, 6 + 4, "twice", signal.SIGTERM)
    assert done.returncode == 128 + signal.SIGTERM, done.returncode
    assert "Traceback" not in done.stderr
