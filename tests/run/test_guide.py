"""The documents' commands on a finished run and its small model, and their trainings with a small model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

from scir_jax.config import cli
from scir_jax.run import answers, health, hub
from scir_jax.text.chat import load_tokenizer
from tests.forks import Fork, environment, quick
from tests.run import engines, hub_cache
from tests.run.runs import ITERATIONS, content, lines, refused
from tests.small_model import main as small_model
from tests.small_model import write_data, write_model
from tests.strikes import Strike

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


# --- on a finished run ------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(whole, world_dir, tmp_path, monkeypatch):
    """A directory of a reader's, who has a model, data and a finished run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("NAME", "my-model", "judge"):
        (tmp_path / "models" / name).symlink_to(world_dir / "model")
    shutil.copytree(whole.path, tmp_path / "runs" / "mine")
    for name in ("prompts", "heldout_pairs"):
        shutil.copy(world_dir / f"{name}.jsonl", tmp_path)
    return tmp_path


@pytest.mark.documented("judge heldout_pairs.jsonl", "judge pairs.jsonl", "sample few.jsonl", "head")
@pytest.mark.documented("export mine exported", "export exported-adapter", "export --model M2", "report")
def test_the_guides_commands(documented, finished, whole, judging, sampling):
    judge, judge_pairs, sample, head, export, adapter, export_m2, report = documented
    done = judge(*judging[2:])
    assert done.code == 0 and "generative_accuracy" in done.out and "verdict_mass" in done.out, done.err
    rows = lines(finished / "judged.jsonl")
    assert len(rows) == len(lines(finished / "heldout_pairs.jsonl")) and all(0 < r["p_generative"] < 1 for r in rows)
    shutil.copy("heldout_pairs.jsonl", "pairs.jsonl")
    before = (finished / "judged.jsonl").rename("before.jsonl").read_bytes()
    assert judge_pairs(*judging).code == 0 and (finished / "judged.jsonl").read_bytes() == before
    assert content(finished / "summary.json")["pairs"] == len(rows)

    assert head.words() and subprocess.run(head.command.line, shell=True, check=False).returncode == 0
    asked = lines(finished / "few.jsonl")
    assert len(asked) == 20 and asked == lines(finished / "prompts.jsonl")[:20]
    done = sample(*sampling[2:])
    assert done.code == 0, done.err
    answered = lines(finished / "answers.jsonl")
    assert len(answered) == 20 * 3 and {"response", "stop"} <= answered[0].keys()

    done = export()
    assert done.code == 0, done.err
    found, expected = (load_file(p / "model.safetensors") for p in (finished / "exported", whole.path / "export"))
    assert found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in found)
    assert f"M{ITERATIONS + 1} of a run" in (finished / "exported" / "README.md").read_text()
    refused(adapter(), "a run without adapters", "export the model instead")
    assert export_m2(instead={"RUN": "runs/mine", "DIR": "second"}).code == 0
    assert "M2 of a run" in (finished / "second" / "README.md").read_text()
    (finished / "runs" / "mine" / "report.html").unlink()
    assert report(instead={"RUN": "runs/mine"}).code == 0 and (finished / "runs" / "mine" / "report.html").exists()


@pytest.mark.documented("doctor prompts.jsonl")
def test_the_doctor_before_the_first_run(documented, finished, judging, monkeypatch):
    """docs/launch.md"""
    monkeypatch.setattr(health, "IMPLEMENTATIONS", ())
    (doctor,) = documented
    done = doctor(*judging[2:])
    assert done.code == 0 and "nothing stands in the way" in done.out, done.out


@pytest.mark.documented("sample alpaca_eval", "compare mine.json")
def test_answers_for_alpaca_eval_and_their_win_rate(documented, finished, judging, sampling):
    """docs/evaluation.md: the questions are answered, and a model compares the answers with others'."""
    sample, compare = documented
    prompts = [row["prompt"] for row in lines(finished / "prompts.jsonl")[:4]]
    questions = [{"instruction": prompt, "dataset": "few"} for prompt in prompts]
    (finished / "alpaca_eval.json").write_text(json.dumps(questions))
    theirs = [{"instruction": prompt, "output": "ab", "generator": "theirs"} for prompt in prompts]
    (finished / "theirs.json").write_text(json.dumps(theirs))
    done = sample(*sampling[2:], "--sample.responses", 1)
    assert done.code == 0, done.err
    assert [row["instruction"] for row in content(finished / "mine.json")] == prompts
    done = compare(*judging[2:])
    assert done.code == 0 and "win_rate" in done.out, done.err
    assert len(content(finished / "annotations.json")) == len(prompts)


# --- trainings --------------------------------------------------------------------------------------------------------

# A few programs less to compile.
SHORT = ("--iterations", 1, "--text.max_response_tokens", 8, "--text.packing", "off", "--evaluate.greedy", "false")
SHORT += ("--run.tensorboard", "false", "--sample.responses", 2, "--optimise.batch_size", 8)
SFT = ("--sft.ift_batch_size", 8, "--sft.eft_batch_size", 8, "--sft.epochs", 1, "--replay.eft_batch_size", 4)


@pytest.fixture
def reader(tmp_path, monkeypatch, no_page):
    """A directory of a reader's, who has a small model by several names and data."""
    monkeypatch.chdir(tmp_path)
    write_model("qwen3", tmp_path / "models" / "NAME")
    for name in ("my-model", "Mistral-7B-v0.1"):
        (tmp_path / "models" / name).symlink_to("NAME")
    write_data(tmp_path, rows=8)
    return tmp_path


def trained(run: Path) -> list[dict]:
    """The table of a finished run."""
    rows = content(run / "summary.json")["rows"]
    assert [row["model"] for row in rows] == ["M1", "M2"]
    assert (run / "export" / "model.safetensors").exists()
    return rows


@pytest.mark.documented("train --ift ift.jsonl", "train more.jsonl", "train models/Mistral-7B-v0.1")
def test_the_guides_trainings(documented, reader):
    """One's own model with all files, a run that goes on from it, and the paper's configuration."""
    mine, further, paper = documented
    shutil.copy("prompts.jsonl", "more.jsonl")
    (reader / "data").mkdir()
    for path in reader.glob("*.jsonl"):
        shutil.copy(path, reader / "data")
    short = (*SHORT, "--text.max_prompt_tokens", 200)
    for train, name, more in ((mine, "mine", SFT), (further, "further", SFT[-2:]), (paper, "mistral-7b", SFT)):
        done = train(*short, *more)
        assert done.code == 0, done.err
        rows = trained(reader / "runs" / name)
    assert "generative_accuracy" in rows[-1]


@pytest.mark.documented("train models/my-model", "train --model models/NAME --prompts prompts.jsonl --run mine")
def test_prompts_are_enough(documented, reader):
    """README's command: it trains, evaluates, exports. Again, by another name of the model, it keeps what it proposed."""
    first, again = documented
    for name in ("ift", "eft", "heldout_prompts", "heldout_pairs"):
        (reader / f"{name}.jsonl").unlink()
    done = first(*SHORT)
    assert done.code == 0, done.err
    proposed = done.err.partition("starting")[0]
    assert "text.max_prompt_tokens" in proposed and "lora.rank" in proposed and "text.max_response" not in proposed
    run = reader / "runs" / "mine"
    assert all("length" in row for row in trained(run))
    recorded = cli.of_run(run)
    assert recorded.run.proposed["data.holdout"] and recorded.text.chat_template_kwargs == {"enable_thinking": False}
    assert recorded.generative.templates == ("evaluator",) and recorded.sft.epochs == 0
    rows = [json.dumps(row["messages"]) for row in lines(run / "iteration_01" / "pairs.jsonl")]
    held = [
        json.dumps([{"role": "user", "content": row["prompt"]}])
        for row in lines(run / "iteration_00" / "heldout_responses.jsonl")
    ]
    assert rows and held and not set(rows) & set(held)
    before = (run / "config.yaml").read_text()
    done = again(*SHORT)
    assert done.code == 0 and "settings that were proposed when the run began stay" in done.err, done.err
    assert (run / "config.yaml").read_text() == before.replace("my-model", "NAME")


@pytest.mark.documented("train /shared/mistral", "train OWNER/NAME", "train engines/vllm")
def test_the_papers_configuration_with_prompts_alone(documented, reader, tmp_path_factory, monkeypatch):
    """As the launching scripts start it, with a model of the hub, and with a stand-in for vLLM."""
    launched, of_the_hub, with_vllm = documented
    short = (*SHORT, "--text.max_prompt_tokens", 200)
    (reader / "shared").mkdir()
    (reader / "shared" / "mistral").symlink_to(reader / "models" / "NAME")
    shutil.copy("prompts.jsonl", "shared")
    done = launched(*short, instead={"/shared": reader / "shared"})
    assert done.code == 0, done.err
    trained(reader / "shared" / "runs" / "mistral-7b")
    answers_of = "iteration_01/responses.jsonl"
    expected = lines(reader / "shared" / "runs" / "mistral-7b" / answers_of)

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_found", {})
    hub_cache.add(cache, "OWNER/NAME", reader / "models" / "NAME", "a" * 40)
    done = of_the_hub(*short)
    assert done.code == 0, done.err
    trained(reader / "runs" / "mine")
    assert lines(reader / "runs" / "mine" / answers_of) == expected

    tokenizer = load_tokenizer(reader / "models" / "NAME")
    ids = tokenizer.convert_tokens_to_ids(list("abcdefgh"))
    texts = {str(i): tokenizer.decode([i]) for i in ids}
    engine = tmp_path_factory.mktemp("engine")
    (engine / "vllm.py").write_text(f"IDS = {ids!r}\nTEXTS = {texts!r}\n" + engines.VLLM)
    (engine / "python").write_text(f'#!/bin/sh\nPYTHONPATH={engine} exec {sys.executable} "$@"\n')
    (engine / "python").chmod(0o755)
    monkeypatch.setenv("PATH", str(engine), prepend=os.pathsep)
    monkeypatch.setattr(answers, "FAR", 100.0)
    done = with_vllm(*short, instead={"runs/mine": "runs/vllm"})
    assert done.code == 0, done.err
    trained(reader / "runs" / "vllm")
    assert {len(row["response_ids"]) for row in lines(reader / "runs" / "vllm" / answers_of)} == {2}


@pytest.mark.documented("tests.small_model", "train simulated")
def test_eight_simulated_chips(documented, compiled_directory, tmp_path, monkeypatch):
    """The small model of the guide under the paper's configuration, in a process of its own, split over eight devices."""
    make, simulated = documented
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["small_model", *make.words()])
    small_model()
    out, err = tmp_path / "out", tmp_path / "err"
    # Beside the document's flag, those of tests.processes.QUICK and tests.conftest.
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    flags = flags if jax.__version_info__ < (0, 11) else flags.split()[0]
    (devices,) = simulated.command.variables
    env = quick(
        XLA_FLAGS=f"{devices.removeprefix('XLA_FLAGS=')} {flags}", JAX_COMPILATION_CACHE_DIR=str(compiled_directory)
    )
    del env["JAX_NUM_CPU_DEVICES"]
    until = ("--run.until", "sft", "--sft.epochs", 1, "--text.packing", "off", "--run.tensorboard", "false")
    process = Fork(
        [*Strike(ahead=False).command, *simulated.words(), *until],
        env=environment(**env),
        cwd=tmp_path,
        out=out,
        err=err,
    )
    try:
        assert process.wait(300) == 0, err.read_text()
    finally:
        process.kill()
    assert "bfloat16, 8 cpu device(s)" in err.read_text() and "stopped after sft" in err.read_text()
    rows = lines(tmp_path / "runs" / "simulated" / "metrics.jsonl")
    assert rows and all(0 < row["loss"] < 20 for row in rows)
