"""The points of one answer as an expectation over the judge's digits: by hand, and against the model of transformers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scir_jax.data import batches
from scir_jax.errors import InputError
from scir_jax.method.rewards import expected_points
from scir_jax.run import scoring
from scir_jax.run.counts import Counts
from scir_jax.run.setup import prepare
from tests.run.runs import POINTWISE
from tests.training import heldout_items

pytestmark = pytest.mark.usefixtures("cheap_compilation")

DIGITS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)


def test_points_by_hand():
    p = np.array([[0.1, 0.2, 0.3, 0.1, 0.2, 0.1], [1 / 6] * 6, [0.5, 0, 0, 0, 0, 0.5], [0.02, 0, 0, 0, 0.06, 0.02]])
    logits = np.log(np.maximum(p, 1e-30)).astype(np.float32)
    # 0.2 + 0.6 + 0.3 + 0.8 + 0.5; the digits' probabilities are divided by their sum, 0.1 in the last row.
    expected = [2.4, 2.5, 2.5, (4 * 0.06 + 5 * 0.02) / 0.1]
    np.testing.assert_allclose(expected_points(logits, DIGITS), expected, rtol=1e-6)
    np.testing.assert_allclose(expected_points(logits - 30, DIGITS), expected, rtol=1e-5)
    sure = np.array([[-1e4, 0, 1e4, 0, 0, 0]], np.float32)
    assert expected_points(sure, DIGITS).tolist() == [2.0] and expected_points(sure, DIGITS).dtype == np.float32
    other = expected_points(logits, tuple(2 * x + 1 for x in DIGITS))
    np.testing.assert_allclose(other, 2 * np.array(expected) + 1, rtol=1e-6)


@pytest.fixture(scope="module")
def config(world_dir, tiny_config, tmp_path_factory):
    file = tmp_path_factory.mktemp("points") / "points.yaml"
    file.write_text(POINTWISE)
    models = ("generative", "implicit", "pointwise")
    settings = dict(rewards=dict(models=models), evaluate=dict(batch_size=4))
    return tiny_config(world_dir, generative=dict(pointwise=str(file)), **settings)


def test_points_are_those_of_the_model_whatever_the_company(config, world_dir, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(world_dir / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(world_dir / "model")
    two = tokenizer.convert_tokens_to_ids(["1", "2"])
    found = {}
    for shortest in (batches.SHORTEST, 8):
        monkeypatch.setattr(batches, "SHORTEST", shortest)
        setup = prepare(config)
        needs = (setup.encoder, setup.programs, setup.parameters.configured())
        items, spent, seen = heldout_items(setup), [], []
        found[shortest] = scoring.rate_answers(*needs, items, seen.append, spent.append)
        assert sum(seen) == len(items) > 8 and len(setup.programs.rate_groups) == (1 if shortest > 8 else 3)
    expected, tokens = [], 0
    for prompt, answer in items:
        text = f"verdict {prompt.messages[-1]['content']}{answer.text}"
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        tokens += len(ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        p, all_p = logits[two].softmax(dim=0), logits.softmax(dim=0)
        expected.append((float(p[0] + 2 * p[1]), float(all_p[two].sum())))
    for rated in found.values():
        np.testing.assert_allclose(np.stack([rated["points"], rated["points_mass"]], axis=1), expected, atol=1e-5)
    assert np.std([points for points, _ in expected]) > 0.05
    (counted,) = spent
    assert counted == Counts(judged=tokens, flops=counted.flops) and counted.flops > 2 * tokens
    # Another order and other neighbours change no bit.
    order = np.random.default_rng(0).permutation(len(items))[:7]
    again = scoring.rate_answers(*needs, [items[i] for i in order])
    np.testing.assert_array_equal(again["points"], rated["points"][order])


def test_a_world_without_the_digits_is_refused(world_dir, tiny_config):
    config = tiny_config(world_dir, rewards=dict(models=("implicit", "pointwise")))
    with pytest.raises(InputError, match="judge template additive: verdict '0' is not a token of the model"):
        prepare(config)
