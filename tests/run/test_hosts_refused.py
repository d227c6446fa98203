"""What two hosts refuse before the first step."""

import re
import shutil

import pytest

from scir_jax.config.files import to_yaml
from scir_jax.config.schema import Config
from scir_jax.engine.hosts.hosts import SEEN
from scir_jax.errors import InputError
from scir_jax.run.directory import RunDirectory
from tests.hosts import run_hosts

# Every host in a directory of its own.
ELSEWHERE = """
import os, sys
os.chdir(sys.argv[1])
sys.argv = ["train", *sys.argv[2:]]
from scir_jax import train
from scir_jax.run import command
command.main(train.main)
"""


@pytest.fixture
def refused(tmp_path, world_dir, tiny_config):
    """refused(run directory, arguments of host 1, **overrides) -> the last line of both hosts, each in its folder."""
    folders = [tmp_path / f"host{host}" for host in range(2)]
    for folder in folders:
        folder.mkdir()

    def run(directory, arguments=(), **overrides):
        config = tiny_config(
            world_dir,
            run=dict(directory=str(directory), distributed=True, host_timeout=20.0),
            world=dict(directory=None),
            **overrides,
        )
        file = tmp_path / "refused.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        done = run_hosts(
            lambda host: ["-c", ELSEWHERE, folders[host], "--config", file, *(arguments if host else ())],
            2,
            forked=True,
        )
        for one in done:
            assert one.code == 2, done
            assert "Traceback" not in one.err and "compile" not in one.err, done
        return [one.last for one in done]

    return run


def test_different_configurations(refused, tmp_path):
    lines = refused(tmp_path / "run", ["--optimise.batch_size", "16", "--run.seed", "3"])
    for line in lines:
        assert line == (
            "error: host 1 has run.seed 3, optimise.batch_size 16, host 0 has 0, 8: "
            "start all hosts with the same configuration"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_directory_of_its_own(refused, tmp_path):
    lines = refused("runs/own")
    assert lines[0] == f"error: host 1: {lines[1].removeprefix('error: ')}"
    assert re.match(r"error: runs/own is not the directory of that name on host 0 \(.+\): give one on a file", lines[1])
    assert not list((tmp_path / "host0" / "runs" / "own").glob(".seen*"))


def test_a_file_that_one_host_lacks(refused, tmp_path, world_dir):
    shutil.copy(world_dir / "prompts.jsonl", tmp_path / "host0")
    lines = refused(tmp_path / "run", data=dict(prompts="prompts.jsonl"))
    assert lines[0] == f"error: host 1: {lines[1].removeprefix('error: ')}"
    assert "prompts.jsonl" in lines[1]


@pytest.mark.slow
def test_other_data_of_the_same_lengths(refused, tmp_path, world_dir):
    text = (world_dir / "prompts.jsonl").read_text()
    lines = text.splitlines()
    (tmp_path / "host0" / "prompts.jsonl").write_text(text)
    (tmp_path / "host1" / "prompts.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    for line in refused(tmp_path / "run", data=dict(prompts="prompts.jsonl")):
        assert re.match(
            r'error: host 1 has sha256\.data\.prompts "[0-9a-f]{64}", host 0 has "[0-9a-f]{64}": start', line
        )
        assert line.endswith("start all hosts with the same files and versions")


def test_what_was_left_in_a_run_directory(tmp_path):
    """A host that is killed while others look for its directory leaves a file there, which is no one else's."""
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    (directory.path / f"{SEEN}0").touch()
    assert directory.open(Config()) is False
    directory.close()
    (directory.path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds files of something else \(notes.txt\)"):
        directory.open(Config())
