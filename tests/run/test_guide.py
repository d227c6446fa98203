"""The documents' commands beside train, run on a finished run and its small model in place of the real one."""

import importlib
import json
import shutil

import pytest
from safetensors.numpy import load_file

from scir_jax import train
from scir_jax.run import health
from tests.run.runs import ITERATIONS, content, lines, refused
from tests.small_model import write_data, write_model
from tests.test_documents import ALL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


@pytest.fixture
def documented(whole, world_dir, judging, sampling, command, tmp_path, monkeypatch):
    """documented(module, word, *more) -> how the documents' command that holds the word ends, in a directory of a reader's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("NAME", "my-model", "judge"):
        (tmp_path / "models" / name).symlink_to(world_dir / "model")
    shutil.copytree(whole.path, tmp_path / "runs" / "mine")
    for name in ("prompts", "heldout_pairs"):
        shutil.copy(world_dir / f"{name}.jsonl", tmp_path)
    few = (world_dir / "prompts.jsonl").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "few.jsonl").write_text("".join(few))
    # What the small model needs. Options of the documents come later, and win.
    small = {"sample": sampling, "judge": judging, "compare": judging, "doctor": judging}

    def run(module, word, *more):
        found = [rest for name, rest in ALL if name == f"scir_jax.{module}" and word in rest and "--push" not in rest]
        assert len(found) == 1, found
        return command(importlib.import_module(f"scir_jax.{module}").main, *small.get(module, ()), *more, *found[0])

    return run


def test_the_guides_commands(documented, whole, tmp_path):
    done = documented("judge", "heldout_pairs.jsonl")
    assert done.code == 0 and "generative_accuracy" in done.out and "verdict_mass" in done.out, done.err
    rows = lines(tmp_path / "judged.jsonl")
    assert len(rows) == len(lines(tmp_path / "heldout_pairs.jsonl")) and all(0 < r["p_generative"] < 1 for r in rows)

    done = documented("sample", "few.jsonl")
    assert done.code == 0, done.err
    answers = lines(tmp_path / "answers.jsonl")
    assert len(answers) == 4 * 3 and {"response", "stop"} <= answers[0].keys()

    done = documented("export", "exported")
    assert done.code == 0, done.err
    found, expected = (load_file(p / "model.safetensors") for p in (tmp_path / "exported", whole.path / "export"))
    assert found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in found)
    assert f"M{ITERATIONS + 1} of a run" in (tmp_path / "exported" / "README.md").read_text()
    refused(documented("export", "exported-adapter"), "a run without adapters", "export the model instead")


def test_the_doctor_before_the_first_run(documented, monkeypatch):
    """docs/launch.md"""
    monkeypatch.setattr(health, "IMPLEMENTATIONS", ())
    done = documented("doctor", "prompts.jsonl")
    assert done.code == 0 and "nothing stands in the way" in done.out, done.out


def test_answers_for_alpaca_eval_and_their_win_rate(documented, tmp_path):
    """docs/evaluation.md: the questions are answered, and a model compares the answers with others'."""
    prompts = [row["prompt"] for row in lines(tmp_path / "few.jsonl")]
    questions = [{"instruction": prompt, "dataset": "few"} for prompt in prompts]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(questions))
    theirs = [{"instruction": prompt, "output": "ab", "generator": "theirs"} for prompt in prompts]
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    done = documented("sample", "alpaca_eval.json", "--sample.responses", 1)
    assert done.code == 0, done.err
    assert [row["instruction"] for row in content(tmp_path / "mine.json")] == prompts
    done = documented("compare", "mine.json")
    assert done.code == 0 and "win_rate" in done.out, done.err
    assert len(content(tmp_path / "annotations.json")) == len(prompts)


def test_the_guides_trainings(command, tmp_path, monkeypatch, no_page):
    """One's own model with all files, a run that goes on from it, and the paper's configuration."""
    monkeypatch.chdir(tmp_path)
    write_model("qwen3", tmp_path / "models" / "NAME")
    (tmp_path / "models" / "Mistral-7B-v0.1").symlink_to(tmp_path / "models" / "NAME")
    write_data(tmp_path, rows=8)
    shutil.copy("prompts.jsonl", "more.jsonl")
    (tmp_path / "data").mkdir()
    for path in tmp_path.glob("*.jsonl"):
        shutil.copy(path, tmp_path / "data")
    short = ["--iterations", 1, "--text.max_prompt_tokens", 200, "--text.max_response_tokens", 8]
    short += ["--evaluate.greedy", "false", "--run.tensorboard", "false", "--text.packing", "off"]
    batches = ["--optimise.batch_size", 8, "--sft.ift_batch_size", 8, "--sft.eft_batch_size", 8, "--sft.epochs", 1]
    batches += ["--replay.eft_batch_size", 4, "--sample.responses", 2]
    for run, first in (("mine", "M1"), ("further", "M1"), ("mistral-7b", "M1")):
        found = [rest for name, rest in ALL if name == "scir_jax.train" and ("--run", run) in zip(rest, rest[1:])]
        arguments = next(rest for rest in found if "--model" in rest and "models/my-model" not in rest)
        done = command(train.main, *arguments, *short, *(batches if run != "further" else batches[:2] + batches[6:]))
        assert done.code == 0, done.err
        rows = content(tmp_path / "runs" / run / "summary.json")["rows"]
        assert [row["model"] for row in rows] == [first, "M2"], rows
        assert (tmp_path / "runs" / run / "export" / "model.safetensors").exists()
    assert "generative_accuracy" in rows[-1]
