"""What commands say of a run directory that is none, another version's, or has lost what it was made of."""

import json
import shutil
from pathlib import Path

import pytest

import scir_jax
from scir_jax import compare, evaluate, export, judge, sample
from scir_jax.errors import InputError
from scir_jax.report import page
from scir_jax.report.contents import read_run
from scir_jax.run.directory import RunDirectory
from scir_jax.run.manifest import LAYOUT
from tests.run.runs import content, edit_json, refused

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def begun(whole, tmp_path):
    """The finished run's records, without its models, to be changed."""
    run = tmp_path / "begun"
    shutil.copytree(whole.path, run, ignore=shutil.ignore_patterns("checkpoints", "export", "tensorboard"))
    (run / "checkpoints" / "M0").mkdir(parents=True)
    return run


def edit_settings(run: Path, before: str, now: str) -> None:
    path = run / "config.yaml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, now))


def test_what_is_no_run(begun, command, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        for call in ((evaluate.main, "--run", place), (export.main, place, tmp_path / "out")):
            refused(command(*call), place, "not a run directory")
        assert page.main([str(place)]) == 2
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_version(begun, command, tmp_path):
    edit_settings(begun, "  packing: ", "  newer: 1\n  packing: ")
    for call in ((evaluate.main, "--run", begun), (export.main, begun, tmp_path / "out")):
        refused(command(*call), begun, "text.newer", "use the version that wrote it")
    edit_json(begun / "manifest.json", layout=LAYOUT + 1)
    words = (begun, "another version of scir_jax, whose files have another layout")
    for more in ((), ("--again",)):
        refused(command(evaluate.main, "--run", begun, *more), *words)
    refused(command(export.main, begun, tmp_path / "out"), *words)
    # The page shows what it can read.
    assert read_run(begun).notices[0].startswith("Another version of scir_jax wrote the run")
    (begun / "export").mkdir()
    with pytest.raises(InputError, match=words[1]):
        scir_jax.load(begun)
    with pytest.raises(InputError, match=words[1]):
        scir_jax.Run(begun)


def test_a_run_whose_model_or_data_are_gone_or_have_changed(begun, command, world_dir, tmp_path):
    edit_settings(begun, f"{world_dir}/heldout_pairs", f"{tmp_path}/gone/heldout_pairs")
    again, out = (evaluate.main, "--run", begun, "--again"), (export.main, begun, tmp_path / "out")
    tell = f"python -m scir_jax.train --config {begun}/config.yaml --run {begun} --"
    refused(command(*again), f"{tmp_path}/gone/heldout_pairs.jsonl", "not there", f"{tell}data.heldout_pairs PLACE")
    assert command(evaluate.main, "--run", begun).code == 0, "what was found is printed all the same"
    # A model does not depend on data; there is none to export here.
    refused(command(*out), "no model M3")
    edit_settings(begun, f"{world_dir}/model", f"{tmp_path}/gone/model")
    for call in (again, out):
        refused(command(*call), f"model.path is {tmp_path}/gone/model", f"{tell}model.path PLACE")
    edit_settings(begun, f"{tmp_path}/gone/heldout_pairs", f"{world_dir}/heldout_pairs")
    shutil.copytree(world_dir / "model", tmp_path / "gone" / "model")
    path = tmp_path / "gone" / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(content(path) | {"model_max_length": 7}))
    refused(command(*again), "changed since this run began: model.path/tokenizer_config.json")
    refused(command(*out), "changed since this run began: model.path/tokenizer_config.json in")
    (begun / "manifest.json").unlink()
    refused(command(*out), "manifest.json was removed")
    assert not (tmp_path / "out").exists()


def test_adapters_belong_to_the_weights_that_they_were_trained_on(begun, whole, world_dir, make):
    """Of a run that trains all weights those of model.path do not count."""
    made = content(begun / "manifest.json")
    key = "model.path/model.safetensors"
    edit_json(begun / "manifest.json", sha256=made["sha256"] | {key: "0" * 64})
    run, config = RunDirectory(begun), make().programs.config
    run.check_models(config)
    with pytest.raises(InputError, match=f"changed since this run began: {key}"):
        run.check_models(make(lora=dict(rank=2)).programs.config)


def test_settings_that_a_run_has_already(begun, command, world_dir, tmp_path):
    words = ("is evaluated with the settings of the run: leave out --evaluate.samples; ", "train")
    refused(command(evaluate.main, "--run", begun, "--again", "--evaluate.samples", 9), *words)
    refused(command(evaluate.main, "--run", begun, "--reference", "x", "--output", "y"), "--output, --reference")
    refused(command(evaluate.main, "--again"), "--again evaluates the models of a run: give --run")
    files = ("--prompts", world_dir / "prompts.jsonl", "--output", tmp_path / "o")
    refused(command(sample.main, "--run", begun, *files), "sample has no use for --run", "--model RUN/export")
    files = ("--input", world_dir / "heldout_pairs.jsonl", "--output", tmp_path / "o")
    refused(command(judge.main, f"--run={begun}", *files), "judge has no use for --run")
    refused(command(compare.main, "--run", begun, "--judge", "x"), "compare has no use for --run")
