"""A whole run with adapters: its checkpoints, exports and commands."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from scir_jax import evaluate, export, judge, sample, train
from scir_jax.config import cli
from scir_jax.config.checks import resolve
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.model import lora
from scir_jax.model.hf import adapters
from scir_jax.report import page as report
from scir_jax.run import scoring, training
from scir_jax.run.setup import prepare
from tests.run.runs import lines, model, refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]

SETTINGS = dict(rank=2, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
TARGETS = [("attention", "q"), ("attention", "v"), ("mlp", "down")]


@pytest.fixture(scope="module")
def adapted(configure):
    """adapted(directory, **overrides) -> YAML file of a run with adapters in `directory`."""
    settings = dict(lora=SETTINGS, sft=dict(learning_rate=0.03), optimise=dict(learning_rate=0.03))
    return lambda directory, **overrides: configure(directory, **settings, **overrides)


@pytest.fixture(scope="module", autouse=True)
def no_page():
    """Runs leave out the report, whose figures take longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda path: path / "report.html")
        yield


@pytest.fixture(scope="module")
def whole(adapted, shared_programs, tmp_path_factory):
    """A finished run whose implicit reference is the base model. Read only."""
    path = tmp_path_factory.mktemp("adapted") / "run"
    file = adapted(path, implicit=dict(reference="base"))
    assert train.main(["--config", str(file)]) == 0
    config, _ = cli.parse("train", "", ["--config", str(file)])
    setup = prepare(resolve(config))
    return SimpleNamespace(path=path, file=file, programs=setup.programs, parameters=setup.parameters)


def torch_logits(network, ids):
    with torch.no_grad():
        return network.eval()(torch.tensor(ids)).logits.numpy()


def network_of(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_checkpoints_hold_adapters_only(whole):
    names = {f"['layers']['{m}']['{n}']['{side}']" for m, n in TARGETS for side in ("lora_a", "lora_b")}
    assert {p.name for p in (whole.path / "checkpoints").iterdir()} == {"M0", "M1", "M2", "arrays.json"}
    found = [model(whole.path, number) for number in range(3)]
    arch = whole.programs.arch
    d, f, queries = arch.hidden_size, arch.intermediate_size, arch.num_heads * arch.head_dim
    keys = arch.num_kv_heads * arch.head_dim
    trained = arch.num_layers * 2 * ((d + queries) + (d + keys) + (f + d))
    for params in found:
        assert params.keys() == names
        assert {str(x.dtype) for x in params.values()} == {"float32"}
        assert sum(x.size for x in params.values()) == trained < arch.parameter_count() / 4
    assert not any(found[0][name].any() for name in names if "lora_b" in name)
    for before, after in itertools.pairwise(found):
        assert all(not np.array_equal(before[name], after[name]) for name in names)


def test_the_first_steps_preference_loss_is_ln_2(whole):
    rows = [row for row in lines(whole.path / "metrics.jsonl") if row["stage"] == "optimise"]
    assert rows[0]["selected"] > 0 and rows[0]["preference"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_base_reference_is_the_model_without_adapters(whole, world_dir, tiny_config):
    encoder, _, programs, parameters = prepare(resolve(tiny_config(world_dir)))
    params = parameters.of_directory(world_dir / "model")
    pairs = lines(whole.path / "iteration_01" / "pairs.jsonl")
    items = [
        (encoder.prompt(pair["messages"]), encoder.sampled(pair[f"response_{side}_ids"]))
        for pair in pairs
        for side in "ab"
    ]
    expected = scoring.score_answers(encoder, programs, params, items)["logps"].reshape(-1, 2)
    cached = {role: [pair["cached"][f"{role}_logps"] for pair in pairs] for role in ("implicit", "start")}
    np.testing.assert_allclose(cached["implicit"], expected, atol=1e-4)
    assert np.abs(expected - cached["start"]).max() > 0.1


def test_export_and_adapter_are_the_last_model(whole, world_dir, tmp_path):
    programs, path = whole.programs, whole.path
    ids = np.array([row["prompt_ids"][:8] for row in lines(path / "iteration_01" / "responses.jsonl")[:3]], np.int32)
    ours, trained = programs.model, ModelStore(path / "checkpoints").load(2, programs.abstract_trained)
    params = lora.join(trained, whole.parameters.frozen)
    expected = jax.jit(lambda params, ids: ours.logits(params, ours.hidden(params, ids)))(params, ids)
    merged = torch_logits(network_of(path / "export"), ids)
    adapted = peft.PeftModel.from_pretrained(network_of(world_dir / "model"), path / "adapter")
    np.testing.assert_allclose(merged, expected, atol=1e-4)
    np.testing.assert_allclose(torch_logits(adapted, ids), merged, atol=1e-4)
    assert np.abs(torch_logits(network_of(world_dir / "model"), ids) - merged).max() > 0.1
    assert adapted.peft_config["default"].base_model_name_or_path == str(world_dir / "model")
    assert not list((path / "export").glob("adapter*"))
    # The command writes the same, of this model and of another one.
    assert export.main([str(path), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert export.main([str(path), str(tmp_path / "export")]) == 0
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "export/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (path / name).read_bytes()
    assert export.main([str(path), str(tmp_path / "first"), "--adapter", "--model", "M1"]) == 0
    found = adapters.load(tmp_path / "first", programs.arch, ours.lora)
    first = ModelStore(path / "checkpoints").load(1, programs.abstract_trained)
    jax.tree.map(np.testing.assert_array_equal, found, first)


def test_an_adapter_that_was_not_written_to_its_end_is_written_again(whole, command):
    weights_file = whole.path / "adapter" / "adapter_model.safetensors"
    before = weights_file.read_bytes()
    weights_file.unlink()  # it is the last file, so that a killed process leaves the directory like this
    assert command(train.main, "--config", whole.file).code == 0
    assert weights_file.read_bytes() == before


def test_commands_read_an_adapter_as_its_merged_model(whole, reading, world_dir, command, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(world_dir / "heldout_pairs.jsonl", pairs)
    judging = ("--evaluate.batch_size", 4, "--generative.templates", json.dumps([str(world_dir / "judge.yaml")]))
    base = world_dir / "model"
    found = {}
    for name, place in (
        ("adapter", ("--lora.adapter", whole.path / "adapter")),
        ("merged", ("--model.path", whole.path / "export")),
        ("base", ()),
    ):
        rows = {}
        for number, (main, arguments) in enumerate(
            (
                (
                    sample.main,
                    ("--data.prompts", world_dir / "prompts.jsonl", "--sample.prompts", 8, "--sample.temperature", 0),
                ),
                (judge.main, (*judging, "--input", pairs, "--reference", base)),
            )
        ):
            output = tmp_path / f"{name}{number}.jsonl"
            done = command(main, *reading, *place, *arguments, "--output", output)
            assert done.code == 0, done.err
            rows[number] = lines(output)
        found[name] = rows
    responses = {name: [row["response_ids"] for row in rows[0]] for name, rows in found.items()}
    assert responses["adapter"] == responses["merged"] != responses["base"]
    for key in ("p_generative", "p_implicit", "logps", "reference_logps"):
        values = {name: np.array([row[key] for row in rows[1]]) for name, rows in found.items()}
        np.testing.assert_allclose(values["adapter"], values["merged"], atol=1e-4)
        assert (np.abs(values["base"] - values["merged"]).max() < 1e-4) == (key == "reference_logps")
    assert all(row["p_implicit"] == 0.5 for row in found["base"][1])


def test_evaluate_reads_an_adapter(whole, reading, world_dir, command, tmp_path):
    arguments = ("--data.heldout_pairs", world_dir / "heldout_pairs.jsonl", "--evaluate.batch_size", 4)
    arguments += ("--generative.templates", json.dumps([str(world_dir / "judge.yaml")]))
    found = []
    for place in (("--lora.adapter", whole.path / "adapter"), ("--model.path", whole.path / "export"), ()):
        done = command(evaluate.main, *reading, *place, *arguments, "--output", tmp_path / "evaluation.json")
        assert done.code == 0, done.err
        found.append(json.loads((tmp_path / "evaluation.json").read_text())["verdict_mass"])
    assert found[0] == pytest.approx(found[1], abs=1e-4) and abs(found[0] - found[2]) > 1e-3


def test_a_run_goes_on_from_an_adapter(whole, adapted, command, tmp_path, monkeypatch):
    """M0 is the adapter's model, and its rank and targets are the adapter's."""
    adapter = Path(shutil.copytree(whole.path / "adapter", tmp_path / "adapter"))

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_sft", stopped)
    arguments = ("--config", adapted(tmp_path / "run"), "--lora.adapter", adapter)
    assert command(train.main, *arguments).code == 130
    before, found = model(whole.path, 2), model(tmp_path / "run", 0)
    assert before.keys() == found.keys() and all(before[name].tobytes() == found[name].tobytes() for name in before)
    # The adapter is part of what the run began with.
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    refused(command(train.main, *arguments), "changed since this run began", "lora.adapter/adapter_model.safetensors")


def test_models_of_other_adapters_are_not_started_from(whole, adapted, command, tmp_path):
    start = ("--run.start_from", whole.path)
    for number, (changes, words) in enumerate(
        (
            (("--lora.alpha", 3), "adapters of rank 2, scale 1.5, on q_proj"),
            (("--lora.rslora", "true"), "scale 4.24264"),
            (("--lora.rank", 0), "this run's have none"),
            (("--lora.targets", '["q_proj", "v_proj"]'), "on q_proj, v_proj;"),
        )
    ):
        done = command(train.main, "--config", adapted(tmp_path / f"run{number}"), *start, *changes)
        refused(done, "its models have adapters of rank 2, scale 3, on q_proj, v_proj, down_proj", words)


def test_what_the_commands_refuse(whole, reading, world_dir, command, adapted, tmp_path):
    sampling = (*reading, "--data.prompts", world_dir / "prompts.jsonl", "--output", tmp_path / "out.jsonl")
    adapter = whole.path / "adapter"
    refused(command(sample.main, *sampling, "--lora.adapter", tmp_path / "none"), "no adapter_config.json")
    refused(
        command(sample.main, *sampling, "--lora.adapter", adapter, "--lora.rank", 3), "lora.rank is 3", "has rank 2"
    )
    refused(command(sample.main, *sampling, "--lora.rank", -1), "lora.rank must not be negative")
    refused(command(sample.main, *sampling, "--lora.rank", 1, "--lora.alpha", 0), "alpha positive")
    run = adapted(tmp_path / "run")
    refused(command(train.main, "--config", run, "--lora.targets", '["query"]'), "no layer is called 'query'", "q_proj")
    refused(command(train.main, "--config", run, "--lora.dropout", 1), "dropout in [0, 1)")
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_without_adapters_has_none_to_export(whole, command, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("config.yaml", "manifest.json"):
        shutil.copy(whole.path / name, directory)
    recorded = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(recorded.replace("rank: 2", "rank: 0"))
    done = command(export.main, directory, tmp_path / "out", "--adapter")
    refused(done, f"{directory}: a run without adapters (lora.rank is 0); export the model instead")
    assert not (tmp_path / "out").exists()
