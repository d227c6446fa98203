"""compare: preferences of a judge, of a grader and of a file; answers in the formats that it reads."""

import json
import shutil

import numpy as np
import pytest

import scir_jax
from scir_jax import compare, judge, sample
from scir_jax.config.schema import Config, RunConfig, SampleConfig
from scir_jax.run import mt_bench
from tests.run.runs import lines, refused, write_lines

pytestmark = pytest.mark.usefixtures("shared_programs")


def longer(prompt, response):
    return {"quality": float(len(response))}


def broken(prompt, response):
    raise KeyError("quality")


@pytest.fixture
def answers(world_dir, tmp_path):
    """Files of two models' answers to the same prompts, the second one in another order."""
    pairs = lines(world_dir / "heldout_pairs.jsonl")[:4]
    ours = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs]
    theirs = [{"instruction": row["prompt"], "output": row["rejected"], "generator": "B"} for row in pairs]
    (tmp_path / "theirs.json").write_text(json.dumps(theirs[::-1]))
    return ("--outputs", write_lines(tmp_path / "ours.jsonl", ours), "--baseline", tmp_path / "theirs.json"), pairs


def test_a_model_judges_both_orders(answers, world_dir, judging, command, tmp_path):
    files, pairs = answers
    options = (*judging[2:], "--run.auto", "false")
    written, output = tmp_path / "annotations.json", tmp_path / "win_rates.json"
    done = command(compare.main, *files, "--judge", world_dir / "model", *options, "--annotations", written,
                   "--output", output, "--names", '["A", "C"]')  # fmt: skip
    assert done.code == 0, done.err
    told = tmp_path / "judged.jsonl"
    given = write_lines(tmp_path / "pairs.jsonl", pairs)
    assert command(judge.main, *judging, "--input", given, "--output", told).code == 0
    expected = [row["p_generative"] for row in lines(told)][::-1]
    rows = json.loads(written.read_text())
    assert [row["instruction"] for row in rows] == [row["prompt"] for row in pairs][::-1]
    assert {(row["generator_1"], row["generator_2"]) for row in rows} == {("B", "A")}
    np.testing.assert_allclose([row["preference"] - 1 for row in rows], expected, atol=1e-5)
    values = json.loads(output.read_text())
    assert values["win_rate"] == pytest.approx(100 * np.mean(expected), abs=1e-3)
    assert "at least 5 rows" in done.err and "length_controlled_winrate" not in values
    # What it wrote it reads.
    again = command(compare.main, "--judge", written)
    assert again.code == 0 and f"{values['win_rate']:.2f}" in again.out


def test_a_grader_judges(answers, command):
    files, pairs = answers
    done = command(compare.main, *files, "--judge", f"{__name__}:longer")
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in pairs]
    assert done.code == 0, done.err
    assert f"{100 * np.mean([0.5 + np.sign(gap) / 2 for gap in gaps]):.2f}" in done.out
    refused(command(compare.main, *files, "--judge", f"{__name__}:broken"), "the grader fails", "KeyError")
    refused(command(compare.main, *files, "--judge", f"{__name__}:absent"), "absent")


def test_answers_are_needed(command, tmp_path, world_dir):
    refused(command(compare.main, "--judge", world_dir / "model"), "--outputs and --baseline")
    refused(
        command(compare.main, "--judge", tmp_path / "no.json", "--outputs", "a", "--baseline", "b"), "b: no such file"
    )


def test_answers_as_alpaca_eval_has_them(sampling, world_dir, command, tmp_path):
    prompts = lines(world_dir / "heldout_prompts.jsonl")[:2]
    source, output = write_lines(tmp_path / "prompts.jsonl", prompts), tmp_path / "model_outputs.json"
    options = (*sampling[:-2], "--format", "alpaca_eval", "--data.prompts", source, "--output", output)
    done = command(sample.main, *options, "--generator", "mine")
    assert done.code == 0, done.err
    rows = json.loads(output.read_text())
    assert [row.keys() for row in rows] == [{"instruction", "output", "generator", "dataset"}] * 2
    assert [row["instruction"] for row in rows] == [row["prompt"] for row in prompts]
    assert rows[0]["generator"] == "mine" and {p.name for p in tmp_path.iterdir()} == {source.name, output.name}
    refused(command(sample.main, *options, "--sample.responses", 2), "sample.responses")


QUESTIONS = {"81": ["q1", "q2"], "82": ["q3"], "b": ["q4", "q5"]}


def test_later_turns_stand_behind_the_answers_before_them():
    asked = []

    class Told:
        config = Config(sample=SampleConfig(responses=2), run=RunConfig(seed=5))

        def sample(self, prompts, responses=None, seed=5):
            """Answers with the number of turns, the sample's number and the seed."""
            asked.extend(prompts)
            count = responses or self.config.sample.responses
            return [{"response": f"{len(p)}.{i}.{seed}"} for p in prompts for i in range(count)]

    rows = mt_bench.answers(Told(), QUESTIONS, "mine")
    assert [row["question_id"] for row in rows] == [81, 82, "b"]
    assert [choice["index"] for choice in rows[0]["choices"]] == [0, 1]
    assert [choice["turns"] for choice in rows[0]["choices"]] == [["1.0.5", "3.0.6"], ["1.1.5", "3.0.6"]]
    assert [choice["turns"] for choice in rows[1]["choices"]] == [["1.0.5"], ["1.1.5"]]
    assert len({row["answer_id"] for row in rows}) == 3
    assert asked[4] == [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "1.1.5"},
        {"role": "user", "content": "q2"},
    ]


@pytest.mark.slow
@pytest.mark.documented("sample mt_bench", "compare question.jsonl")
def test_answers_as_mt_bench_has_them(documented, sampling, judging, world_dir, command, tmp_path, monkeypatch):
    answer, compare_answers = documented
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("my-model", "judge"):
        (tmp_path / "models" / name).symlink_to(world_dir / "model")
    texts = [row["prompt"] for row in lines(world_dir / "heldout_prompts.jsonl")[:2]]
    questions = write_lines(
        tmp_path / "question.jsonl", [{"question_id": 81, "turns": texts}, {"question_id": 82, "turns": texts[:1]}]
    )
    output = tmp_path / "my-model.jsonl"
    done = answer(*sampling[4:-2], "--sample.temperature", 0, "--generator", "mine")
    assert done.code == 0, done.err
    first, second = lines(output)[0]["choices"][0]["turns"]
    conversation = [
        {"role": "user", "content": texts[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": texts[1]},
    ]
    model = scir_jax.load(world_dir / "model", text=dict(max_prompt_tokens=80, max_response_tokens=12))
    told = model.sample([texts[0], conversation], responses=1, temperature=0)
    assert [row["response"] for row in told] == [first, second]
    shutil.copy(output, tmp_path / "other.jsonl")
    done = compare_answers(*judging[2:], "--text.max_prompt_tokens", 80)
    assert done.code == 0 and "50.00" in done.out
    files = ("--outputs", output, "--baseline", output, "--questions", questions)
    done = command(compare.main, *files, "--judge", f"{__name__}:longer")
    assert done.code == 0 and "50.00" in done.out
