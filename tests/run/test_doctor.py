"""The doctor: what works is said, what would stand in a run's way fails with the sentence that the run would have."""

import os
import shutil

import pytest
from huggingface_hub import constants

from scir_jax import doctor
from scir_jax.run import health
from tests.run.reward_models import write_reward_model

pytestmark = pytest.mark.usefixtures("cheap_compilation")


@pytest.fixture
def asked(command, write_config):
    """asked(**overrides) -> (exit code, question -> line) of the doctor for a tiny run."""

    def ask(*arguments, **overrides):
        done = command(doctor.main, "--config", write_config(**overrides), *arguments)
        *lines, last = done.out.splitlines()
        assert (last == "nothing stands in the way") == (done.code == 0)
        return done.code, {line[6:24].strip(): (line[:6].strip(), line[24:]) for line in lines}

    return ask


def test_a_machine_on_which_the_run_could_start(asked):
    code, found = asked()
    assert code == 0
    assert list(found) == [
        *("versions", "devices", "bfloat16", "attention blocks", "attention cudnn", "attention splash", "to the bit"),
        *("settings", "model", "data", "disk"),
    ]
    assert "jax " in found["versions"][1] and "cpu" in found["devices"][1]
    assert found["attention blocks"][0] == "ok" and "long rows take it" in found["attention blocks"][1]
    assert found["attention cudnn"] == ("-", "cuDNN runs on GPUs and this is a CPU")
    assert "parameters" in found["model"][1] and "prompts" in found["data"][1] and "are free at" in found["disk"][1]


def test_what_takes_part_beside_the_model(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "IMPLEMENTATIONS", ())
    reward = write_reward_model("llama", tmp_path / "reward")
    ours = dict(pairs=dict(scorer=str(reward)), preference=dict(labels="external"))
    there = dict(command="A=1 sh {engines}/x.sh {prompts} {output}")
    code, found = asked(**ours, sample=there)
    assert code == 0 and found["pairs.scorer"][0] == found["sample.command"][0] == "ok"
    assert (
        f"{reward}: " in found["pairs.scorer"][1] and f"runs {shutil.which('sh')}: A=1 sh" in found["sample.command"][1]
    )
    ours["pairs"] = dict(scorer="scir_jax.world.grader:grade")
    code, found = asked(**ours, sample=dict(command="no-such-engine {prompts} {output}"))
    assert code == 1 and found["pairs.scorer"][0] == "ok"
    assert found["sample.command"][0] == "FAILS" and "'no-such-engine'" in found["sample.command"][1]
    code, found = asked(sample=dict(command="(cd /; x {prompts}) > {output}"))
    assert code == 0 and found["sample.command"][0] == "-"


def test_bfloat16_attention_is_tried_in_bfloat16(asked, world_dir):
    code, found = asked(model=dict(path=str(world_dir / "model"), dtype="bfloat16"))
    assert code == 0 and "in bfloat16 are within" in found["attention blocks"][1]


def test_wrong_attention_fails(asked, monkeypatch):
    right = health.attention

    def wrong(*rows, implementation, **settings):
        mixed = right(*rows, implementation=implementation, **settings)
        return mixed if implementation == "xla" else mixed * 1.01

    monkeypatch.setattr(health, "attention", wrong)
    code, found = asked()
    assert code == 1 and found["attention blocks"][0] == "FAILS" and "are off by" in found["attention blocks"][1]


def test_what_the_run_lacks_is_named(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(health, "IMPLEMENTATIONS", ())
    code, found = asked(model=dict(path=str(tmp_path / "nothing")), data=dict(prompts=str(tmp_path / "absent.jsonl")))
    assert code == 1
    assert found["model"][0] == found["data"][0] == "FAILS"
    assert "nothing" in found["model"][1] and "no such file: data.prompts" in found["data"][1]
    code, found = asked(implicit=dict(reference="nobody/nothing"))
    assert code == 1 and found["model"][0] == "FAILS" and "implicit.reference 'nobody/nothing'" in found["model"][1]
    code, found = asked(mesh=dict(data=3, fsdp=1, tensor=1))
    assert code == 1 and found["settings"][0] == "FAILS" and "does not make the 1 devices" in found["settings"][1]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    code, found = asked()
    assert code == 1 and "free some space, or lower checkpoint.keep" in found["disk"][1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(asked, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    code, found = asked("--run.directory", tmp_path / "closed" / "run")
    assert code == 1 and "cannot be written" in found["disk"][1]


def test_a_broken_driver_is_an_answer(asked, monkeypatch):
    def broken():
        raise RuntimeError("the driver\nsays no")

    monkeypatch.setattr(health, "_devices", broken)
    code, found = asked()
    assert code == 1 and found["devices"] == ("FAILS", "RuntimeError: the driver says no")
