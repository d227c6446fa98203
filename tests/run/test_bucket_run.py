"""A whole run in a bucket: equal to a run on a disk, stopped at any write, on hosts without a common disk."""

import hashlib
from pathlib import Path

import pytest

from scir_jax.config.files import to_yaml
from scir_jax.run.training import TIMINGS
from tests.forks import ROOT, Fork, environment, quick
from tests.gcs import Bucket
from tests.run.runs import lines
from tests.strikes import Strike

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    started = Bucket(tmp_path_factory.mktemp("bucket"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def run(tiny_config, world_dir, compiled_directory, bucket, tmp_path_factory):
    """run(directory, strike) -> (exit code, stderr) of the training command."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(
        world_dir,
        run=dict(iterations=1, tensorboard=True, compilation_cache=str(compiled_directory)),
        world=dict(directory=None),
        optimise=dict(epochs=2),
        evaluate=dict(greedy=False, samples=2, grader="scir_jax.world.grader:grade"),
    )
    file = folder / "tiny.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")

    def start(directory: str | Path, *arguments: str) -> tuple[int, str]:
        out, err = folder / "out", folder / "err"
        command = [*Strike(ahead=False).command, "--config", file, "--run.directory", directory, *arguments]
        process = Fork(command, env=environment(**quick(), **bucket.environment), cwd=ROOT, out=out, err=err)
        try:
            return process.wait(300), err.read_text(errors="replace")
        finally:
            process.kill()

    return start


def results(directory: Path) -> dict[str, object]:
    """What a run made, without what tells of times and of where it lies."""
    names = [f"iteration_0{t}/{name}" for t in (0, 1) for name in ("evaluation.json", "heldout_responses.jsonl")]
    names += [f"iteration_01/{name}.jsonl" for name in ("responses", "pairs", "decisions")]
    found = {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}
    found["metrics"] = [
        {k: v for k, v in row.items() if k not in TIMINGS} for row in lines(directory / "metrics.jsonl")
    ]
    weights = (directory / "export" / "model.safetensors").read_bytes()
    return found | {"weights": hashlib.sha256(weights).hexdigest()}


@pytest.fixture(scope="module")
def on_disk(run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("disk") / "run"
    code, err = run(directory)
    assert code == 0, err
    return results(directory)


def test_a_run_in_a_bucket_is_that_on_a_disk(run, bucket, on_disk, tmp_path):
    code, err = run(f"gs://{bucket.name}/whole")
    assert code == 0, err
    assert results(bucket.copy("whole", tmp_path)) == on_disk
    assert "scir_jax-" not in err and f"report: gs://{bucket.name}/whole/report.html" in err
