"""Run directories that are something else, in use, of another layout, or on a full disk."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from scir_jax import evaluate, export, train
from scir_jax.run.manifest import LAYOUT
from tests.run.runs import content, files, model, refused, same

pytestmark = pytest.mark.usefixtures("shared_programs")


# --- the run directory ----------------------------------------------------------------------------------------------


def test_a_run_directory_that_is_something_else(command, tiny_run, tmp_path, no_stages):
    config = tiny_run()
    run = tmp_path / "run"
    run.write_text("a file")
    refused(command(train.main, "--config", config), run, "is a file")
    refused(command(train.main, "--config", config, "--run.directory", run / "below"), run)
    assert run.read_text() == "a file"
    run.unlink()
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    refused(command(train.main, "--config", config), run, "notes.txt")
    assert files(run) == {"notes.txt": b"mine"}
    (run / "notes.txt").rename(run / "config.yaml")
    refused(command(train.main, "--config", config), run, "config.yaml")
    assert files(run) == {"config.yaml": b"mine"}


def test_a_run_directory_in_use(command, tiny_run, tmp_path, no_stages):
    config = tiny_run()
    refused(command(train.main, "--config", config), "the stages begin")
    with FileLock(tmp_path / "run" / ".lock"):
        before = files(tmp_path / "run")
        refused(command(train.main, "--config", config), "another process is running here")
        assert files(tmp_path / "run") == before
    refused(command(train.main, "--config", config), "the stages begin")


def test_data_that_changed_since_the_run_began(command, tiny_run, world_dir, tmp_path, no_stages):
    prompts = Path(shutil.copy(world_dir / "prompts.jsonl", tmp_path / "prompts.jsonl"))
    config = tiny_run(data=dict(prompts=str(prompts)))
    refused(command(train.main, "--config", config), "the stages begin")
    (tmp_path / "run" / "checkpoints" / "M0").mkdir(parents=True)
    with prompts.open("a") as file:
        file.write('{"prompt": "copy abc="}\n')
    refused(command(train.main, "--config", config), "changed since this run began: data.prompts")
    shutil.copy(world_dir / "prompts.jsonl", prompts)
    refused(command(train.main, "--config", config), "the stages begin")


def set_layout(run, layout):
    manifest = content(run / "manifest.json")
    manifest.pop("layout")
    (run / "manifest.json").write_text(json.dumps(manifest | ({} if layout is None else {"layout": layout})))


def change_config(run, change):
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    change(recorded)
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))


OTHER_LAYOUTS = {
    "an older one": lambda run: set_layout(run, LAYOUT - 1),
    "a newer one": lambda run: set_layout(run, LAYOUT + 1),
    "none": lambda run: set_layout(run, None),
    "a section less": lambda run: change_config(run, lambda c: c.pop("training")),
    "a section more": lambda run: change_config(run, lambda c: c.update(optimizer=c["training"])),
    "a key less": lambda run: change_config(run, lambda c: c["rewards"].pop("weights")),
    "a key more": lambda run: change_config(run, lambda c: c["rewards"].update(generative_weight=1.0)),
    "no sections": lambda run: (run / "config.yaml").write_text("mine"),
}


@pytest.mark.slow
def test_a_run_directory_of_another_layout(command, tiny_run, tmp_path, no_stages):
    call, whole, run = (train.main, "--config", tiny_run()), tmp_path / "whole", tmp_path / "run"
    refused(command(*call), "the stages begin")
    (run / "checkpoints" / "M0").mkdir(parents=True)
    refused(command(*call), "the stages begin")
    run.rename(whole)
    for kind, damage in OTHER_LAYOUTS.items():
        shutil.copytree(whole, run)
        damage(run)
        before = files(run)
        for more in ((), ("--run.iterations", 5)):
            refused(command(*call, *more), run, "was written by another version", "choose another run.directory")
        # Other commands miss no key of its configuration.
        for other in (evaluate.main, "--run", run), (export.main, run, tmp_path / "model"):
            if kind not in ("a section less", "a key less"):
                refused(command(*other), run)
        assert files(run) == before and not (tmp_path / "model").exists(), kind
        shutil.rmtree(run)


# --- other commands -------------------------------------------------------------------------------------------------


def test_export_refuses(command, tiny_run, tmp_path, no_stages):
    run, output = tmp_path / "run", tmp_path / "model"
    refused(command(export.main, tmp_path / "none", output), "not a run directory")
    refused(command(train.main, "--config", tiny_run()), "the stages begin")
    refused(command(export.main, run, output), "no model M0")
    refused(command(export.main, run, output, "--model", "last"), "expected M0, M1")
    # What a killed process may leave beside complete models.
    (run / "checkpoints" / "M0.orbax-checkpoint-tmp").mkdir(parents=True)
    refused(command(export.main, run, output, "--model", "M3"), "no model M3")
    assert not output.exists()


# --- processes ------------------------------------------------------------------------------------------------------


def process(module, *arguments, limit=None):
    """A command in a process of its own; `limit` bytes is the largest file that it can write."""
    command = [sys.executable, "-m", f"scir_jax.{module}", *map(str, arguments)]
    # Python ignores SIGXFSZ, so that a write beyond the limit fails as one on a full disk does.
    small = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=small, timeout=300)


class FromProcess:
    def __init__(self, done):
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = FromProcess(process("train", "--run.directory", tmp_path / "run", "--data.prompt", "x"))
    refused(done, "unknown option --data.prompt; did you mean 'data.prompts'?")
    done = FromProcess(process("report", tmp_path / "none"))
    refused(done, tmp_path / "none")


@contextlib.contextmanager
def full_disk(limit: int):
    """Inside, no file of this process grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_full_disk(whole, tiny_run, command, no_page, tmp_path):
    """Wherever a run finds no space, it goes on with what it saved, to the result of one that never missed any."""
    for limit in (4_000, 20_000, 100_000):
        run = tmp_path / str(limit)
        call = (train.main, "--config", tiny_run(), "--run.directory", run)
        with full_disk(limit):
            done = command(*call)
        refused(done, "no space left", code=3)
        before = files(run)
        assert not [name for name in before if name.endswith(".partial")]
        assert command(*call).code == 0
        after = files(run)
        kept = {name for name in before if "/M0/" in name}
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
        assert (run / "summary.json").exists() and (run / "export" / "model.safetensors").exists()
        assert all(same(model(run, n), model(whole.path, n)) for n in range(3))


@pytest.mark.slow
def test_a_full_disk_in_a_process_of_its_own(tiny_run, command, no_page, tmp_path):
    """It ends, though Orbax's threads were saving; without iterations and SFT it has nothing to compile."""
    absent = dict(heldout_prompts=None, heldout_pairs=None)
    config = tiny_run(run=dict(iterations=0), sft=dict(epochs=0.0), data=absent)
    refused(FromProcess(process("train", "--config", config, limit=20_000)), "no space left", code=3)
    run = tmp_path / "run"
    assert (run / "manifest.json").exists() and not (run / "checkpoints" / "M0").exists()
    assert command(train.main, "--config", config).code == 0
    assert (run / "summary.json").exists() and (run / "export" / "model.safetensors").exists()
