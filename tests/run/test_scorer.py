"""External rewards: from a reward model with another tokenizer than the policy's, and from a function."""

import re

import numpy as np
import pytest
from huggingface_hub import constants

from scir_jax import doctor, plan, train
from scir_jax.errors import InputError
from scir_jax.planning.limits import reward_programs
from scir_jax.run import health, hub, scorer
from scir_jax.text.chat import load_tokenizer
from tests.run import hub_cache
from tests.run.reward_models import transformers_scores, write_reward_model
from tests.run.runs import check_iterations, lines, model, refused, same
from tests.training import heldout_items

pytestmark = pytest.mark.usefixtures("shared_programs")

EXTERNAL = dict(
    preference=dict(labels="external"),
    consistency=dict(weight=0.0),
    selection=dict(rule="all"),
    replay=dict(weight=0.0),
)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return write_reward_model("qwen3", tmp_path_factory.mktemp("reward") / "model")


def conversation(item):
    prompt, answer = item
    return [*prompt.messages, {"role": "assistant", "content": answer.text}]


def opened(make, name):
    made = make(pairs=dict(scorer=str(name)), evaluate=dict(batch_size=3), **EXTERNAL)
    return made, scorer.open_scorer(made.programs.config, made.encoder, made.programs)


# What functions of users may do.


def shorter(conversations, answers):
    assert all(c[-1]["role"] == "user" for c in conversations) and len(conversations) == len(answers) <= 6
    return np.array([-len(answer) for answer in answers])


def too_few(conversations, answers):
    return [0.0] * (len(answers) - 1)


def broken(conversations, answers):
    raise KeyError("reward")


def infinite(conversations, answers):
    return [float("inf")] * len(answers)


def test_rewards_are_those_of_transformers(make, reward_model):
    made, found = opened(make, reward_model)
    items = heldout_items(made)
    seen = []
    rewards = found.rewards(items, seen.append)
    assert sum(seen) == len(items)
    expected = transformers_scores(reward_model, [conversation(item) for item in items])
    np.testing.assert_allclose(rewards, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1
    # Company changes nothing.
    np.testing.assert_allclose(found.rewards(items[3:5]), rewards[3:5], atol=1e-6)
    (program,) = found.programs(made.inputs.prompts)
    assert program.tokens % (2 * 3) == 0 and program.known.weights > 0 and program.flops.model > 0
    # A plan has it too, for rows as long as the limits.
    (planned,) = reward_programs(made.programs)
    assert (planned.stage, planned.known) == (program.stage, program.known) and planned.tokens >= program.tokens


def test_a_conversation_that_ends_with_the_pad_token_is_read_before_it(make, tmp_path):
    directory = write_reward_model("llama", tmp_path / "model", pad_token="<|eot_id|>")
    made, found = opened(make, directory)
    items = heldout_items(made)[:5]
    ids = found.chat.flatten(found.chat.pieces(conversation(items[0]), generation_prompt=False))
    assert found.row(items[0]).ids == ids[:-1]
    expected = transformers_scores(directory, [conversation(item) for item in items])
    np.testing.assert_allclose(found.rewards(items), expected, atol=1e-4)


def test_a_function_is_asked_batch_by_batch(make):
    made, found = opened(make, "tests.run.test_scorer:shorter")
    items = heldout_items(made)
    assert found.rewards(items).tolist() == [-len(answer.text) for _, answer in items]
    for name, words in {
        "too_few": "gave 5 rewards for 6 answers",
        "broken": r"KeyError: 'reward' (.*test_scorer.py:\d+)",
        "infinite": f"gave inf for an answer to the prompt {items[0][0].where}",
    }.items():
        with pytest.raises(InputError, match=words.replace("(", r"\(").replace(")", r"\)")):
            opened(make, f"tests.run.test_scorer:{name}")[1].rewards(items)


def test_what_cannot_score_is_refused_before_the_run(configure, command, no_stages, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "IMPLEMENTATIONS", ())
    two = write_reward_model("llama", tmp_path / "two", outputs=2)
    file = configure(tmp_path / "run", **EXTERNAL)
    for name, words in {
        str(two): (two / "config.json", "the score head has 2 outputs", "num_labels=1"),
        "tests.run.test_scorer:absent": ("pairs.scorer", "cannot be imported", "absent"),
        str(tmp_path / "nowhere"): ("pairs.scorer", "neither module:function nor a directory"),
    }.items():
        refused(command(train.main, "--config", file, "--pairs.scorer", name), *words)
        refused(command(plan.main, "--config", file, "--pairs.scorer", name), *words) if ":" not in name else None
        done = command(doctor.main, "--config", file, "--pairs.scorer", name)
        (line,) = (line for line in done.out.splitlines() if "pairs.scorer  " in line)
        assert done.code == 1 and line.startswith("FAILS") and all(str(word) in line for word in words)
    labels = ("--preference.labels", "agreement")
    refused(command(train.main, "--config", file, "--pairs.scorer", two, *labels), "set it to external")


def test_labels_are_probabilities_of_the_rewards():
    assert scorer.label((2.0, 1.0), soft=True) == pytest.approx(1 / (1 + np.exp(-1)))
    assert [scorer.label(pair, soft=False) for pair in ((2.0, 1.0), (1.0, 2.0), (1.0, 1.0))] == [1, 0, 0.5]
    assert scorer.label((1e4, -1e4), soft=True) == 1


@pytest.mark.slow
@pytest.mark.documented("train methods/external")
def test_the_external_baseline_is_one_command(documented, small_quickstart, reward_model, tmp_path, monkeypatch):
    """The best answer against the worst by the reward model of the hub, which labels the pair."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_found", {})
    hub_cache.add(tmp_path / "cache", "OWNER/REWARD-MODEL", reward_model, "a" * 40)
    run = small_quickstart(*documented)
    rows = check_iterations(run)
    answers = {}
    for row in lines(rows.folder / "responses.jsonl"):
        answers.setdefault(row["prompt"], {})[tuple(row["response_ids"])] = row["response"]
    # transformers makes control tokens of answers that spell them; here they stay text.
    control = load_tokenizer(reward_model).get_added_vocab()
    compared = 0
    for pair in rows.pairs:
        texts = list(answers[pair["prompt"]].values())
        assert pair["label"] == float(pair["cached"]["external_reward"][0] > pair["cached"]["external_reward"][1])
        if any(token in text for text in texts for token in control):
            continue
        compared += 1
        scores = transformers_scores(
            reward_model,
            [[*pair["messages"], {"role": "assistant", "content": text}] for text in texts],
        )
        a, b = pair["cached"]["external_reward"]
        assert {round(a, 3), round(b, 3)} == {round(float(scores.max()), 3), round(float(scores.min()), 3)}
    assert compared
    assert len(rows.pairs) == sum(len(found) > 1 for found in answers.values())
    labels = {pair["pair"]: pair["label"] for pair in rows.pairs}
    assert all(d["label"] == labels[d["pair"]] and d["selected"] for d in rows.decisions)
    assert all("frozen_logits" not in pair for pair in rows.pairs)
    assert not same(model(run, 1), model(run, 2))
    names = [name for name in re.findall(r'"(pairs.scorer/[^"]+)"', (run / "manifest.json").read_text())]
    assert {"pairs.scorer/config.json", "pairs.scorer/model.safetensors", "pairs.scorer/chat_template.jinja"} <= {
        *names
    }
