"""Runs of the tiny world that the tests of whole runs have in common."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from scir_jax import train
from scir_jax.config import cli
from scir_jax.config.files import to_dict, to_yaml
from scir_jax.errors import InputError
from scir_jax.report import page as report
from scir_jax.run import preflight, setup
from tests.run.runs import ITERATIONS, RESPONSES, WHOLE, files, like_whole
from tests.run.shared import SharedPrograms


@pytest.fixture
def make(world_dir, tiny_config):
    """make(**sections) -> Setup of the tiny model."""
    return lambda **sections: setup.prepare(tiny_config(world_dir, **sections))


@pytest.fixture(scope="module")
def shared_programs(cheap_compilation):
    """Runs take programs from earlier runs of the process where they are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "Programs", SharedPrograms)
        yield


@pytest.fixture(scope="session")
def configure(tiny_config, world_dir):
    """configure(directory, **overrides) -> YAML file of a run in `directory`, without building a world."""

    def write(directory: Path, **overrides) -> Path:
        run = dict(directory=str(directory), **overrides.pop("run", {}))
        config = tiny_config(world_dir, run=run, world=dict(directory=None), **overrides)
        file = directory.with_name(directory.name + ".yaml")
        file.write_text(to_yaml(config), encoding="utf-8")
        return file

    return write


@pytest.fixture
def no_page(monkeypatch):
    """Runs leave out the report, whose figures take longer than a tiny run."""
    monkeypatch.setattr(report, "write_report", lambda path: path / "report.html")


@pytest.fixture(scope="session")
def make_whole(configure, tmp_path_factory):
    """Makes the run of `whole` when it is first asked for."""

    @functools.cache
    def make() -> SimpleNamespace:
        path = tmp_path_factory.mktemp("whole") / "run"
        file = configure(path, run=dict(iterations=ITERATIONS, tensorboard=True), **WHOLE)
        with SharedPrograms.anew() as compiled:
            assert train.main(["--config", str(file)]) == 0
        config, _ = cli.parse("train", "", ["--config", str(file)])
        return SimpleNamespace(path=path, file=file, config=config, files=files(path), compiled=compiled)

    return make


@pytest.fixture(scope="module")
def whole(shared_programs, make_whole):
    """A finished run of two iterations. Read only."""
    return make_whole()


@pytest.fixture
def tiny_run(whole, configure, tmp_path):
    """tiny_run(**overrides) -> YAML file of a run of one iteration in tmp_path/run, with the whole run's programs."""

    def write(**overrides):
        return configure(tmp_path / "run", **like_whole(overrides))

    return write


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the finished run to change."""
    return Path(shutil.copytree(whole.path, tmp_path / "copied"))


@pytest.fixture
def from_m1(configure, whole, no_page, tmp_path):
    """from_m1(*arguments, **overrides) -> the finished directory of a run from the whole run's M1.

    Its shapes are those of the whole run unless something else is said, so that programs are compiled once.
    """

    def run(*arguments, **overrides):
        settings = like_whole(overrides)
        settings["run"] = dict(start_from=str(whole.path)) | settings.get("run", {})
        settings["data"] = dict(heldout_prompts=None) | settings.get("data", {})
        file = configure(tmp_path / "run", **settings)
        assert train.main(["--config", str(file), *map(str, arguments)]) == 0
        return tmp_path / "run"

    return run


@pytest.fixture
def small_quickstart(tiny_config, world_dir, whole, no_page, tmp_path, monkeypatch):
    """small_quickstart(documented) -> the finished directory of a document's training from the quickstart's settings.

    Everything but the method is as in a run of from_m1. The whole run is that of the quickstart.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(whole.path)
    config = to_dict(tiny_config(world_dir, **like_whole(dict(data=dict(heldout_prompts=None)))))
    same = ("model", "data", "text", "sft", "sample", "optimise", "checkpoint", "evaluate")
    small = {name: config[name] for name in same} | {"run": dict(iterations=1, tensorboard=False)}
    small |= {
        "world.directory": None,
        "replay.eft_batch_size": 8,
        "generative.templates": config["generative"]["templates"],
    }

    def run(documented, *more):
        given = documented.command.arguments
        own = {"run.start_from": "runs/quickstart", "run.directory": "runs/again"}
        own = {key: value for key, value in own.items() if f"--{key}" not in given}
        done = documented(*cli.arguments(small | own), *more)
        assert done.code == 0, done.err
        return tmp_path / (own.get("run.directory") or given[given.index("--run.directory") + 1])

    return run


# --- commands on the tiny model ---------------------------------------------------------------------------------------


@pytest.fixture
def reading(world_dir):
    """Options of a command that reads the tiny model."""
    return ("--model.path", world_dir / "model", "--text.max_prompt_tokens", 32, "--text.max_response_tokens", 12)


@pytest.fixture
def judging(reading, world_dir):
    templates = json.dumps([str(world_dir / "judge.yaml")])
    return (*reading, "--evaluate.batch_size", 8, "--generative.templates", templates)


@pytest.fixture
def sampling(reading):
    return (*reading, "--sample.batch_size", WHOLE["sample"]["batch_size"], "--sample.responses", RESPONSES)


@pytest.fixture
def broken(world_dir, tmp_path):
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(world_dir / "model", tmp_path / "model"))


@pytest.fixture
def no_stages(monkeypatch):
    """A run ends where it would compile for its stages."""

    def reached(*_):
        raise InputError("the stages begin")

    monkeypatch.setattr(preflight, "check_memory", reached)
