"""The reward models against float64 NumPy, their symmetries, the consensus and the fitted length penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.method import rewards
from tests.method_reference import CACHED, FRESH, configured, evidence, example, options, ref_rewards, swapped


def test_verdict_logit_is_the_mean_over_both_orders():
    v = np.random.default_rng(0).normal(0, 3, (50, 2, 2)).astype(np.float32)
    out = rewards.verdict_logits(jnp.asarray(v))
    first_as_a, second_as_a = v[:, 0, 0] - v[:, 0, 1], v[:, 1, 0] - v[:, 1, 1]
    np.testing.assert_allclose(out["logit"], (first_as_a - second_as_a) / 2, atol=1e-6)
    np.testing.assert_allclose(out["slot_bias"], (first_as_a + second_as_a) / 2, atol=1e-6)
    np.testing.assert_array_equal(out["flip"], (first_as_a > 0) == (second_as_a > 0))
    # The first answer favoured as A (row 0) and as B (row 1) is a high logit, not a low one.
    assert rewards.verdict_logits(jnp.array([[[5.0, 0.0], [0.0, 5.0]]]))["logit"][0] == 5


def test_verdict_symmetries():
    rng = np.random.default_rng(1)
    v = jnp.asarray(rng.normal(0, 3, (50, 2, 2)), jnp.float32)
    out = rewards.verdict_logits(v)
    p = jax.nn.sigmoid(out["logit"])
    turned = rewards.verdict_logits(v[:, ::-1])
    np.testing.assert_allclose(jax.nn.sigmoid(turned["logit"]), 1 - p, atol=1e-6)
    np.testing.assert_array_equal(turned["slot_bias"], out["slot_bias"])
    same = rewards.verdict_logits(v.at[:, 1].set(v[:, 0]))
    np.testing.assert_array_equal(jax.nn.sigmoid(same["logit"]), 0.5)
    # Whatever is added to A in both orders, and to both letters in one order.
    shift = jnp.asarray(rng.normal(0, 4, (50, 1)), jnp.float32)
    biased = rewards.verdict_logits(v.at[:, :, 0].add(shift))
    np.testing.assert_allclose(jax.nn.sigmoid(biased["logit"]), p, atol=1e-6)
    np.testing.assert_allclose(biased["slot_bias"], out["slot_bias"] + shift[:, 0], atol=1e-5)
    np.testing.assert_allclose(rewards.verdict_logits(v.at[:, 0].add(shift))["logit"], out["logit"], atol=1e-5)


def test_one_order_is_one_verdict():
    v = jnp.asarray(np.random.default_rng(5).normal(0, 3, (50, 1, 2)), jnp.float32)
    out = rewards.verdict_logits(v)
    assert set(out) == {"logit"}, "one verdict does not tell the slot from the answer"
    np.testing.assert_allclose(out["logit"], v[:, 0, 0] - v[:, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(rewards.verdict_logits(v[..., ::-1])["logit"], -out["logit"])


@pytest.mark.parametrize(
    ("z", "flip"), [((1, 1), 1), ((-1, -2), 1), ((1, -1), 0), ((-3, 1), 0), ((0, 1), 0), ((0, 0), 0)]
)
def test_flip_is_the_same_letter_in_both_orders(z, flip):
    verdicts = jnp.array([[[z[0], 0.0], [z[1], 0.0]]])
    assert rewards.verdict_logits(verdicts)["flip"][0] == flip


def test_every_template_is_judged_alone():
    v = np.random.default_rng(2).normal(0, 3, (20, 3, 2, 2)).astype(np.float32)
    out = rewards.judged(jnp.asarray(v))
    for g in range(3):
        for name, values in rewards.verdict_logits(jnp.asarray(v[:, g])).items():
            np.testing.assert_allclose(out[name][:, g], values, rtol=1e-6)


def test_single_verdicts_favour_the_first_answer():
    v = np.random.default_rng(3).normal(0, 3, (20, 2, 2, 2)).astype(np.float32)
    single = rewards.single_verdicts(v)
    assert single.shape == (20, 4) and single.dtype == np.float32
    for g in range(2):
        # Shown first it is the letter A, shown second the letter B.
        np.testing.assert_array_equal(single[:, 2 * g], v[:, g, 0, 0] - v[:, g, 0, 1])
        np.testing.assert_array_equal(single[:, 2 * g + 1], v[:, g, 1, 1] - v[:, g, 1, 0])
    # Their mean is the template's logit; a swapped pair's orders change places, and all signs.
    np.testing.assert_allclose(single.reshape(20, 2, 2).mean(axis=2), rewards.judged(v)["logit"], atol=1e-6)
    np.testing.assert_array_equal(
        rewards.single_verdicts(v[:, :, ::-1]).reshape(20, 2, 2), -single.reshape(20, 2, 2)[..., ::-1]
    )


@pytest.mark.parametrize("length", options("ImplicitConfig", "length"))
def test_implicit_reward(length):
    rng = np.random.default_rng(2)
    policy, reference = rng.normal(-20, 9, (2, 30, 2)).astype(np.float32)
    lengths, penalty = rng.integers(1, 40, (30, 2)), rng.normal(0, 1, (30, 2)).astype(np.float32)
    beta = 0.3
    per = lengths if length == "mean" else 1
    r = beta * (policy.astype(float) - reference) / per - (penalty if length == "penalty" else 0)
    settings = dict(beta=beta, length=length)
    found = rewards.implicit(policy, reference, lengths, penalty, **settings)
    np.testing.assert_allclose(found, r[:, 0] - r[:, 1], atol=1e-5)
    turned = rewards.implicit(*(x[:, ::-1] for x in (policy, reference, lengths, penalty)), **settings)
    np.testing.assert_allclose(jax.nn.sigmoid(turned), 1 - jax.nn.sigmoid(found), atol=1e-6)
    level = rewards.implicit(policy, policy, lengths, np.zeros_like(penalty), **settings)
    np.testing.assert_array_equal(jax.nn.sigmoid(level), 0.5)
    # An empty answer's reward is finite: its log-ratio is 0.
    empty = rewards.implicit(
        np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), np.zeros((1, 2), int), penalty[:1] * 0, **settings
    )
    assert empty[0] == 0


@pytest.mark.parametrize("length", options("RewardsConfig", "likelihood_length"))
def test_likelihood_reward_is_frozen(length):
    rng = np.random.default_rng(3)
    start, lengths = rng.normal(-20, 9, (30, 2)).astype(np.float32), rng.integers(1, 40, (30, 2))
    per = start.astype(float) / (lengths if length == "mean" else 1)
    found = rewards.likelihood(start, lengths, length=length)
    np.testing.assert_allclose(found, per[:, 0] - per[:, 1], atol=1e-5)
    assert rewards.likelihood(np.zeros((1, 2), np.float32), np.zeros((1, 2), int), length=length)[0] == 0
    gradient = jax.grad(lambda s: rewards.likelihood(s, lengths, length=length).sum())(jnp.asarray(start))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("templates", [("a",), ("a", "b")])
@pytest.mark.parametrize("name", rewards.REWARDS)
def test_entries_of_the_table(name, templates):
    """Values, columns, what is read, and that a swapped pair has the opposite sign."""
    config = configured(
        {
            "generative.templates": templates,
            "implicit.beta": 0.3,
            "implicit.length": "penalty",
            "rewards.entropy_scale": 0.7,
            "rewards.likelihood_length": "mean",
        }
    )
    reward, values = rewards.REWARDS[name], example(config, 5)
    given = evidence(values, config, everything=True)
    given = given._replace(
        fresh={reading: given.fresh[reading] for reading in reward.reads},
        cached={reading: given.cached[reading] for reading in reward.cached},
        frozen={},
    )
    found = rewards.reward_logits(given, config, [name])
    assert set(found) == {name} and found[name].dtype == jnp.float32
    assert found[name].shape == (7, rewards.columns(name, config)) == ref_rewards(values, config)[name].shape
    np.testing.assert_allclose(found[name], ref_rewards(values, config)[name], rtol=1e-5, atol=1e-5)
    turned = evidence(swapped(values), config, everything=True)
    np.testing.assert_allclose(reward.logits(turned, config), -found[name], atol=1e-5)
    if reward.health:
        assert all(health.shape == (7,) for health in reward.health(given).values())
    # It has no other readings than those that there are, and nothing that it names is idle.
    assert set(reward.reads) <= set(FRESH) and set(reward.cached) <= set(CACHED)
    for field in ("fresh", "cached"):
        for reading in getattr(given, field):
            less = {key: value for key, value in getattr(given, field).items() if key != reading}
            with pytest.raises(KeyError, match=reading):
                reward.logits(given._replace(**{field: less}), config)
                reward.health(given._replace(**{field: less}))


def test_consensus_is_the_weighted_sum_and_templates_share_a_weight():
    logits = np.random.default_rng(4).normal(0, 3, (20, 4)).astype(np.float32)
    parts = {"likelihood": logits[:, :1], "generative": logits[:, 1:3], "implicit": logits[:, 3:]}
    for order in (list(parts), list(parts)[::-1]):
        np.testing.assert_allclose(
            rewards.consensus(
                {name: jnp.asarray(parts[name]) for name in order},
                {"generative": 3.0, "implicit": 0.5, "likelihood": 0.25},
            ),
            0.25 * logits[:, 0] + 1.5 * (logits[:, 1] + logits[:, 2]) + 0.5 * logits[:, 3],
            atol=1e-5,
        )
    # A weight may be 0, negative or absent.
    np.testing.assert_allclose(
        rewards.consensus(parts, {"implicit": -2.0, "likelihood": 0.0}), -2 * logits[:, 3], atol=1e-5
    )


def preferred_gap(alpha, reward, lengths):
    """Mean |y_preferred| - |y_other| under r - alpha |y|."""
    r = reward - alpha * lengths
    better = np.argmax(r, axis=1)
    row = np.arange(len(r))
    return np.mean(lengths[row, better] - lengths[row, 1 - better])


@pytest.mark.parametrize("seed", range(6))
def test_length_penalty_balances_lengths_as_well_as_any(seed):
    rng = np.random.default_rng(seed)
    count = (1, 2, 5, 40, 200, 7)[seed]
    lengths = rng.integers(1, 30, (count, 2))
    reward = 0.2 * lengths * (seed != 5) + rng.normal(0, 1, (count, 2))
    alpha = rewards.fit_length_penalty(reward, lengths)
    assert alpha >= 0
    grid = np.linspace(0, 5, 50_001)
    gaps = np.array([abs(preferred_gap(a, reward, lengths)) for a in grid[:: 1 if count < 50 else 25]])
    assert abs(preferred_gap(alpha, reward, lengths)) <= gaps.min() + 1e-12
    # Which answer of a pair comes first does not matter.
    turned = rng.permuted(np.tile([0, 1], (count, 1)), axis=1)
    row = np.arange(count)[:, None]
    assert rewards.fit_length_penalty(reward[row, turned], lengths[row, turned]) == pytest.approx(alpha, rel=1e-12)
    if seed == 4:
        # Rewarded for length, and a real correction.
        assert preferred_gap(0.0, reward, lengths) > 3 > 0.3 > abs(preferred_gap(alpha, reward, lengths))
        assert alpha == pytest.approx(0.2, abs=0.02)


def test_length_penalty_of_nothing_to_balance():
    assert rewards.fit_length_penalty(np.zeros((0, 2)), np.zeros((0, 2))) == 0
    assert rewards.fit_length_penalty(np.array([[1.0, 0.0]]), np.array([[4, 4]])) == 0
    # Already balanced: nothing is subtracted.
    assert rewards.fit_length_penalty(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[4, 2], [4, 2]])) == 0
    # Shorter ones are preferred: a bonus for length is not given.
    assert rewards.fit_length_penalty(np.array([[0.0, 1.0], [0.0, 2.0]]), np.array([[4, 2], [4, 2]])) == 0
    # The longer ones lead by 3, 1 and 2 tokens; flipping the first of them balances the rest.
    reward, lengths = np.array([[0.3, 0.0], [0.2, 0.0], [18.0, 0.0]]), np.array([[4, 1], [2, 1], [5, 3]])
    alpha = rewards.fit_length_penalty(reward, lengths)
    assert 0.1 < alpha < 0.2 and preferred_gap(alpha, reward, lengths) == 0
