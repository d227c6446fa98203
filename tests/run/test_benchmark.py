"""evaluate --benchmark: every answer's rewards, against what the model says of the row's pairs one by one."""

import json
import shutil
from itertools import combinations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scir_jax import evaluate, judge
from tests.run.runs import lines, write_lines

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def other(world_dir, tmp_path):
    """A model like the tiny one with other weights."""
    directory = shutil.copytree(world_dir / "model", tmp_path / "other")
    noise = np.random.default_rng(0)
    for file in directory.glob("*.safetensors"):
        tensors = {name: x + 0.02 * noise.normal(size=x.shape).astype(x.dtype) for name, x in load_file(file).items()}
        save_file(tensors, file)
    return directory


@pytest.mark.documented("evaluate rewardbench")
def test_rewards_and_scores_of_several_answers(documented, world_dir, other, judging, command, tmp_path, monkeypatch):
    (evaluate_rewards,) = documented
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "my-model").symlink_to(world_dir / "model")
    (tmp_path / "models" / "base").symlink_to(other)
    given = lines(world_dir / "heldout_pairs.jsonl")
    rows = [
        {"id": str(i), "prompt": row["prompt"], "chosen": [row["chosen"]], "subset": "Math",
         "rejected": [row["rejected"], given[i + 1]["chosen"]][: 1 + i % 2]}
        for i, row in enumerate(given[:3])
    ]  # fmt: skip
    write_lines(tmp_path / "filtered.jsonl", rows)
    output, rewards = tmp_path / "rewardbench.json", tmp_path / "rewards.jsonl"
    done = evaluate_rewards(*judging[2:], "--output", output, "--rewards", rewards, "--implicit.beta", 0.5)
    assert done.code == 0, done.err
    asked, numbers = [], []
    for number, row in enumerate(rows):
        answers = row["chosen"] + row["rejected"]
        for i, j in combinations(range(len(answers)), 2):
            asked.append({"prompt": row["prompt"], "response_a": answers[i], "response_b": answers[j]})
            numbers.append((number, i, j))
    pairs, told = write_lines(tmp_path / "pairs.jsonl", asked), tmp_path / "judged.jsonl"
    files = ("--input", pairs, "--output", told, "--reference", other, "--implicit.beta", 0.5)
    assert command(judge.main, *judging, *files).code == 0
    judged = lines(told)
    found = lines(rewards)
    matrices = [np.zeros((len(row["chosen"] + row["rejected"]),) * 2) for row in rows]
    for (number, i, j), told in zip(numbers, judged, strict=True):
        logit = np.log(told["p_generative"] / (1 - told["p_generative"]))
        matrices[number][i, j], matrices[number][j, i] = logit, -logit
        r = found[number]["rewards"]["implicit"]
        assert r[i] - r[j] == pytest.approx(np.log(told["p_implicit"] / (1 - told["p_implicit"])), abs=1e-4)
    for row, z in zip(found, matrices, strict=True):
        r, n = {name: np.array(values) for name, values in row["rewards"].items()}, len(z)
        np.testing.assert_allclose(r["generative"], z.sum(axis=1) / (n - 1), atol=1e-4)
        np.testing.assert_allclose(r["consensus"], z.sum(axis=1) / n + r["implicit"], atol=1e-4)
        assert row["rewards"].keys() == {"generative", "implicit", "consensus"}
    values = json.loads(output.read_text())
    for name in ("generative", "implicit", "consensus"):
        share = np.mean([np.argmax(row["rewards"][name]) == 0 for row in found])
        assert values[name] == {"overall": share, "subsets": {"Math": share}}
    assert values["counts"] == {"Math": 3} and values["version"] == 2
    assert f"{100 * values['consensus']['overall']:.1f}" in done.out


def test_two_answers_and_no_reference(world_dir, judging, command, tmp_path):
    rows = [{**row, "subset": "hep-go"} for row in lines(world_dir / "heldout_pairs.jsonl")[:3]]
    source, output = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "rewardbench.json"
    options = ("--benchmark", "rewardbench", "--input", source, "--output", output)
    done = command(evaluate.main, *judging, *options)
    assert done.code == 0, done.err
    values = json.loads(output.read_text())
    assert values["version"] == 1 and values["generative"]["sections"].keys() == {"reasoning"}
    assert "implicit" not in values and "REASONING" in done.out


def test_without_rows(judging, command):
    done = command(evaluate.main, *judging, "--benchmark", "rewardbench")
    assert done.code == 2 and "--input" in done.err and not done.out
