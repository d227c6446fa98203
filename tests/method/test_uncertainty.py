"""The judge's uncertainty as a weight of pairs, and the policy's entropy as a reward model."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.config.schema import LoraConfig
from scir_jax.engine.forward import SPANS
from scir_jax.method.selection import uncertainty
from scir_jax.run import scoring
from scir_jax.run.setup import prepare


def entropy(p: float) -> float:
    return sum(-x * math.log2(x) for x in (p, 1 - p) if x > 0)


def test_uncertainty_is_what_the_predictions_differ_by():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20, 7)).astype(np.float32)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = [entropy(row.mean()) - np.mean([entropy(p) for p in row]) for row in probabilities]
    np.testing.assert_allclose(uncertainty(jnp.asarray(logits)), expected, atol=1e-5)


def test_uncertainty_of_sure_unsure_and_contradicting_judges():
    verdicts = jnp.asarray([[80.0, 80.0], [0.0, 0.0], [1e4, -1e4], [-2.0, -2.0]])
    np.testing.assert_allclose(uncertainty(verdicts), [0, 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(uncertainty(-verdicts), uncertainty(verdicts), atol=1e-7)


@pytest.fixture(scope="module")
def adapted(world_dir, tiny_config):
    """A model with adapters that change it, and dropout."""
    lora = dataclasses.asdict(LoraConfig(rank=4, dropout=0.5))
    rewards = dict(models=("generative", "implicit", "entropy"))
    config = tiny_config(world_dir, lora=lora, rewards=rewards, generative=dict(passes=6))
    encoder, inputs, programs, parameters = prepare(config)
    params = parameters.of_directory(Path(config.model.path))
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    params = jax.tree.unflatten(
        structure,
        [
            jax.random.normal(jax.random.key(i), x.shape) if path[-1].key == "lora_b" else x
            for i, (path, x) in enumerate(leaves)
        ],
    )
    return encoder, inputs, programs, params


def test_dropout_samples_the_judges_predictions(adapted):
    encoder, inputs, programs, params = adapted
    pairs = inputs.heldout_pairs

    def sample(key, some=pairs):
        return scoring.single_verdicts(encoder, programs, params, some, scoring.nothing, key)

    assert programs.judge_passes == programs.verdicts == 6
    found = sample(jax.random.key(0))
    assert found.shape == (len(pairs), 6) and (found.std(axis=1) > 1e-4).all()
    np.testing.assert_array_equal(sample(jax.random.key(0)), found)
    assert (sample(jax.random.key(1)) != found).any()
    np.testing.assert_allclose(
        sample(jax.random.key(0), [pairs[0].swapped(), *pairs[1:]])[1:], found[1:], rtol=1e-5, atol=1e-6
    )
    assert ((0 < uncertainty(jnp.asarray(found))) & (uncertainty(jnp.asarray(found)) < 1)).all()


def test_entropy_is_the_mean_over_the_answers_tokens(adapted):
    encoder, inputs, programs, params = adapted
    pairs = inputs.heldout_pairs
    items = [(pair.prompt, answer) for pair in pairs for answer in pair.answers]
    assert programs.spans == tuple(SPANS) == ("logps", "entropy")
    found = scoring.score_answers(encoder, programs, params, items)["entropy"]
    model = programs.model
    logits_of = jax.jit(lambda ids: model.logits(params, model.hidden(params, ids)))
    for (prompt, answer), value in list(zip(items, found, strict=True))[:6]:
        ids = np.array([[*prompt.ids, *answer.ids] + [0] * (48 - len(prompt.ids) - len(answer.ids))])
        logits = np.asarray(logits_of(ids))[0].astype(np.float64)
        logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        tokens = -(np.exp(logp) * logp).sum(axis=1)
        first = len(prompt.ids) - 1
        assert value == pytest.approx(tokens[first : first + len(answer.ids)].mean(), abs=1e-5)
