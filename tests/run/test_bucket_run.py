"""A whole run in a bucket: equal to a run on a disk, and stopped at any write."""

import hashlib
from pathlib import Path

import pytest

from scir_jax.config.files import to_yaml
from scir_jax.errors import UNAVAILABLE
from scir_jax.run.training import TIMINGS
from tests.documents import Documented
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
def configured(tiny_config, world_dir, compiled_directory, tmp_path_factory):
    """configured(**sections) -> YAML file of a run."""
    folder = tmp_path_factory.mktemp("configured")

    def write(**sections) -> Path:
        run = dict(iterations=1, tensorboard=True, compilation_cache=str(compiled_directory), **sections.pop("run", {}))
        config = tiny_config(
            world_dir,
            run=run,
            world=dict(directory=None),
            optimise=dict(epochs=2),
            evaluate=dict(greedy=False, samples=2, grader="scir_jax.world.grader:grade"),
            **sections,
        )
        file = folder / f"{len(list(folder.iterdir()))}.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="module")
def run(configured, bucket, tmp_path_factory):
    """run(directory, *instead) -> (exit code, stderr) of the training command, or of what is run instead of it.

    A document's command is run with the configuration of a tiny run, over which its words win.
    """
    folder, file = tmp_path_factory.mktemp("runs"), configured()

    def start(directory: str | Path | Documented, *instead: str) -> tuple[int, str]:
        out, err = folder / "out", folder / "err"
        training = (*Strike(ahead=False).command, "--config", file)
        command = instead or (*training, "--run.directory", directory)
        if isinstance(directory, Documented):
            program = directory.command.program
            begin = training if program == "scir_jax.train" else ("-m", program, "--config", file)
            command = (*begin, *directory.words({"BUCKET": bucket.name}))
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


@pytest.mark.documented("train gs://BUCKET/models/NAME", "doctor gs://BUCKET/runs/mine")
def test_a_run_in_a_bucket_is_that_on_a_disk(documented, run, bucket, on_disk, world_dir, tmp_path):
    """With its model and prompts there too."""
    train, doctor = documented
    for file in (world_dir / "model").iterdir():
        bucket.put(f"models/NAME/{file.name}", file.read_bytes())
    bucket.put("prompts.jsonl", (world_dir / "prompts.jsonl").read_bytes())
    code, err = run(train)
    assert code == 0, err
    url, out = f"gs://{bucket.name}/runs/mine", f"gs://{bucket.name}/out"
    assert results(bucket.copy("runs/mine", tmp_path)) == on_disk
    assert "scir_jax-" not in err and f"report: {url}/report.html" in err
    code, err = run(doctor)
    assert code == 0, err

    # Other commands read it there, and write there.
    code, err = run(url, "-m", "scir_jax.export", url, f"{out}/M2")
    assert code == 0 and f"M2 of {url}: {out}/M2" in err, err
    objects = bucket.objects()
    assert objects["out/M2/model.safetensors"] == objects["runs/mine/export/model.safetensors"]
    model = ["--model.path", f"{out}/M2", "--text.max_prompt_tokens", "32", "--text.max_response_tokens", "12"]
    bucket.put("one.jsonl", b'{"prompt": "ab"}\n')
    sample = ["--data.prompts", f"gs://{bucket.name}/one.jsonl", "--output", f"{out}/answers.jsonl"]
    code, err = run(url, "-m", "scir_jax.sample", *model, *sample, "--sample.responses", "2")
    assert code == 0 and len(bucket.objects()["out/answers.jsonl"].splitlines()) == 2, err


def test_a_run_that_is_stopped_at_writes_goes_on(run, bucket, on_disk, tmp_path):
    """The store takes so many writes more, and then none, or the account may not write any more: as if it were killed."""
    url = f"gs://{bucket.name}/stopped"
    for number in range(200):
        denied = number % 3 == 1
        bucket.faults(**{"deny_at" if denied else "stop_at": (3, 17, 29, 41, 53, 64)[number % 6] + number})
        code, err = run(url)
        if code == 0:
            break
        assert code == (2 if denied else UNAVAILABLE) and "\nerror: " in err and "Traceback" not in err, err
        assert "may not be read and written by this account" in err or not denied, err
    assert number > 5
    bucket.faults()
    assert results(bucket.copy("stopped", tmp_path)) == on_disk
