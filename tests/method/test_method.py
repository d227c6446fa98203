"""The method's formulas against float64 NumPy, written from the mathematics, and gradients by finite differences."""

import dataclasses
import functools
import itertools
import typing
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.config import schema as configuration
from scir_jax.config.schema import Config
from scir_jax.method import consistency, objective, preference, rewards


def configured(values):
    """A Config from {"section.key": value}."""
    sections = defaultdict(dict)
    for name, value in values.items():
        section, key = name.split(".")
        sections[section][key] = value
    config = Config()
    return dataclasses.replace(config, **{s: dataclasses.replace(getattr(config, s), **v) for s, v in sections.items()})


def options(section, key):
    """The values that the configuration allows for a key."""
    return typing.get_args(typing.get_type_hints(getattr(configuration, section))[key])


# --- the reference: float64, probabilities as tables over the two outcomes ------------------------------------------


def table(logits):
    """Log-probabilities [..., 2] that the first and that the second is better."""
    logits = np.asarray(logits, np.float64)
    return np.stack([-np.logaddexp(0, -logits), -np.logaddexp(0, logits)], axis=-1)


def ref_cross(p, q):
    """H(p, q) of two tables."""
    return -(np.exp(p) * q).sum(-1)


def ref_entropy(p):
    return ref_cross(p, p)


def ref_consistency(columns, kind, target=None):
    """The penalty of columns of logits [P] against each other; `target` [P]: the pseudo-label's logit."""
    tables = [table(c) for c in columns]
    ordered = list(itertools.permutations(tables, 2))
    if kind in ("kl", "cross_entropy"):
        values = [ref_cross(p, q) - (ref_entropy(p) if kind == "kl" else 0) for p, q in ordered]
        return np.mean(values, axis=0) if values else np.zeros(len(columns[0]))
    if kind == "js":
        mean = np.log(np.maximum(np.mean(np.exp(tables), axis=0), 1e-320))
        return ref_entropy(mean) - np.mean([ref_entropy(p) for p in tables], axis=0)
    if kind == "agreement":
        joint = np.sum(tables, axis=0)
        return -np.logaddexp(joint[..., 0], joint[..., 1])
    assert kind == "pseudo_label"
    return np.mean([ref_cross(table(target), p) for p in tables], axis=0)


def ref_penalty(logits, at, names, *, kind, stop_gradient="none", target="mutual", consensus=None, sharpen=0.5):
    """`at`: the point at which everything under a stop-gradient is held while `logits` move."""
    columns = [(at if name == stop_gradient else logits)[:, r] for r, name in enumerate(names)]
    if target == "mutual":
        return ref_consistency(columns, kind, at.mean(axis=1) / sharpen)
    teacher = table(consensus)
    result = []
    for r, column in enumerate(columns):
        if kind == "kl":
            result.append(ref_cross(teacher, table(column)) - ref_entropy(teacher))
        elif kind == "cross_entropy":
            result.append(ref_cross(teacher, table(column)))
        else:
            result.append(ref_consistency([consensus, column], kind, (consensus + at[:, r]) / 2 / sharpen))
    return np.mean(result, axis=0)


def ref_loss(margin, q, *, kind, beta, label_smoothing=0.0):
    q = q * (1 - label_smoothing) + (1 - q) * label_smoothing
    result = 0
    for share, m in ((q, margin), (1 - q, -margin)):
        if kind == "sigmoid":
            value = np.log1p(np.exp(-beta * m))
        elif kind == "ipo":
            value = (m - 0.5 / beta) ** 2
        else:
            assert kind == "hinge"
            value = np.where(beta * m < 1, 1 - beta * m, 0)
        result = result + share * value
    return result


def ref_rewards(pairs, config):
    """Logits [P, G] of the judge, [P] of the implicit and of the likelihood reward."""
    v = pairs["verdicts"]
    z = v[..., 0] - v[..., 1]  # [P, G, first or second as A]
    lengths = pairs["lengths"]
    r = config.implicit.beta * (pairs["logps"] - pairs["implicit_logps"])
    if config.implicit.length == "mean":
        r = r / lengths
    elif config.implicit.length == "penalty":
        r = r - pairs["length_penalty"]
    s = pairs["start_logps"] / (lengths if config.rewards.likelihood_length == "mean" else 1)
    return {"generative": (z[..., 0] - z[..., 1]) / 2, "implicit": r[:, 0] - r[:, 1], "likelihood": s[:, 0] - s[:, 1]}


def ref_columns(kinds, config):
    names, columns = [], []
    for name in config.rewards.models:
        for column in np.atleast_2d(kinds[name].T):
            names.append(name)
            columns.append(column)
    return tuple(names), np.stack(columns, axis=1)


def ref_consensus(columns, names, config):
    share = {
        "generative": config.rewards.generative_weight,
        "implicit": config.rewards.implicit_weight,
        "likelihood": config.rewards.likelihood_weight,
    }
    return sum(share[n] / names.count(n) * columns[:, r] for r, n in enumerate(names))


def ref_labels(pairs, kinds, columns, names, config):
    settings = config.preference
    if settings.labels in ("external", "cream"):
        return pairs["external"]
    source = pairs["frozen_logits"] if settings.update == "frozen" else columns
    if settings.labels == "likelihood":
        logit = kinds["likelihood"]
    elif settings.labels == "consensus":
        logit = ref_consensus(source, names, config)
    elif settings.labels == "agreement":
        logit = source.mean(axis=1)
    elif settings.update == "frozen":
        logit = source[:, [n == settings.labels for n in names]].mean(axis=1)
    else:
        logit = kinds[settings.labels] if settings.labels == "implicit" else kinds["generative"].mean(axis=1)
    return np.exp(table(logit)[:, 0]) if settings.soft else np.where(logit > 0, 1.0, np.where(logit < 0, 0.0, 0.5))


def ref_objective(pairs, at, config):
    """(total, sums, decisions) at `pairs`; labels, selection and stopped columns are taken at `at`."""
    kinds, kinds_at = ref_rewards(pairs, config), ref_rewards(at, config)
    (names, columns), (_, columns_at) = ref_columns(kinds, config), ref_columns(kinds_at, config)
    q = ref_labels(at, kinds_at, columns_at, names, config)
    far = np.abs(np.exp(table(columns_at)[..., 0]) - 0.5) > config.selection.confidence
    same = np.all(columns_at > 0, axis=1) | np.all(columns_at < 0, axis=1)
    agreed = same & far.all(axis=1)
    selected = (q != 0.5) & (agreed | (config.selection.rule == "all"))

    def ratio(policy):
        return policy - pairs["preference_logps"]

    m = ratio(pairs["logps"])
    if config.preference.length_normalised:
        m = m / pairs["lengths"]
    losses = ref_loss(
        m[:, 0] - m[:, 1],
        q,
        kind=config.preference.loss,
        beta=config.preference.beta,
        label_smoothing=config.preference.label_smoothing,
    )
    penalties = ref_penalty(
        columns,
        columns_at,
        names,
        kind=config.consistency.kind,
        stop_gradient=config.consistency.stop_gradient,
        target=config.consistency.target,
        consensus=ref_consensus(pairs["frozen_logits"], names, config),
        sharpen=config.consistency.sharpen,
    )
    real = pairs["weight"] > 0
    chosen = real & selected
    z = pairs["verdicts"][..., 0] - pairs["verdicts"][..., 1]
    better, worse = np.where(q >= 0.5, 0, 1), np.where(q >= 0.5, 1, 0)
    row = np.arange(len(q))
    reward = config.preference.beta * ratio(pairs["logps"])
    gap = reward[row, better] - reward[row, worse]
    per_pair = {
        "preference": (losses, chosen),
        "consistency": (penalties, real),
        "agreement": (agreed, real),
        "selected": (selected, real),
        "generative/slot_bias": ((z.sum(axis=2) / 2).mean(axis=1), real),
        "generative/flip_rate": ((np.sign(z[..., 0]) == np.sign(z[..., 1])).mean(axis=1), real),
        "generative/verdict_mass": (pairs["verdict_mass"].mean(axis=(1, 2)), real),
        "generative/entropy": (ref_entropy(table(kinds["generative"].mean(axis=1))), real),
        "implicit/entropy": (ref_entropy(table(kinds["implicit"])), real),
        "rewards/chosen": (reward[row, better], chosen),
        "rewards/rejected": (reward[row, worse], chosen),
        "logps/chosen": (pairs["logps"][row, better], chosen),
        "logps/rejected": (pairs["logps"][row, worse], chosen),
        "rewards/margins": (gap, chosen),
        "rewards/accuracies": (gap > 0, chosen),
    }
    sums = {name: (np.sum(values[where]), where.sum()) for name, (values, where) in per_pair.items()}
    total = 0.0
    for name, weight in (("preference", config.preference.weight), ("consistency", config.consistency.weight)):
        if sums[name][1]:
            total += weight * sums[name][0] / sums[name][1]
    decisions = {
        "p_generative": np.exp(table(kinds["generative"])[..., 0]),
        "p_implicit": np.exp(table(kinds["implicit"])[..., 0]),
        "agreed": agreed,
        "selected": chosen,
        "label": q,
    }
    return total, sums, decisions


def differences(function, x, step=1e-5):
    """Central finite differences of a scalar function of a float64 array."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient


def example(config, seed, pairs=7, real=5):
    """Pairs as float64 arrays of float32 values. The second is a pair of identical responses; the last are padding."""
    rng = np.random.default_rng(seed)
    templates = len(config.generative.templates)
    columns = sum(templates if n == "generative" else 1 for n in config.rewards.models)
    lengths = rng.integers(1, 12, (pairs, 2))
    values = {
        "logps": rng.normal(-9, 4, (pairs, 2)),
        "verdicts": rng.normal(0, 2, (pairs, templates, 2, 2)),
        "verdict_mass": rng.uniform(0, 1, (pairs, templates, 2)),
        "lengths": lengths,
        "preference_logps": rng.normal(-9, 4, (pairs, 2)),
        "implicit_logps": rng.normal(-9, 4, (pairs, 2)),
        "start_logps": rng.normal(-9, 4, (pairs, 2)),
        "length_penalty": 0.07 * lengths,
        "frozen_logits": rng.normal(0, 2, (pairs, columns)),
        "external": rng.choice([0, 0.5, 1, 0.7, 0.2], pairs),
        "weight": np.arange(pairs) < real,
    }
    # Half of the pairs lean to one side everywhere, so that some are agreed on.
    for i in range(0, pairs, 2):
        sign = rng.choice([-1, 1])
        values["verdicts"][i, :, 0, 0] += 6 * sign
        values["logps"][i, 0] += 30 * sign
        values["start_logps"][i, 0] += 30 * sign
    for name, value in values.items():
        if value.shape[1:] == (2,):
            value[1, 1] = value[1, 0]
    values["verdicts"][1, :, 1] = values["verdicts"][1, :, 0]
    return {name: np.float32(value).astype(np.float64) for name, value in values.items()}


def as_pairs(values):
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    return objective.Pairs(**{**arrays, "lengths": arrays["lengths"].astype(jnp.int32)})


def value_and_grad(values, config):
    """(loss, sums, decisions, gradients of logps and verdicts) of the code under test."""
    pairs = as_pairs(values)

    def loss(logps, verdicts):
        sums, decisions = objective.objective(pairs._replace(logps=logps, verdicts=verdicts), config)
        return objective.total(sums, config), (sums, decisions)

    (value, (sums, decisions)), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        pairs.logps, pairs.verdicts
    )
    value, sums, decisions, grads = jax.device_get((value, sums, decisions, grads))
    sums = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
    return float(value), sums, decisions, dict(zip(("logps", "verdicts"), grads))


# --- reward models ---------------------------------------------------------------------------------------------------


def test_generative_logit_is_the_mean_over_both_orders():
    v = np.random.default_rng(0).normal(0, 3, (50, 2, 2)).astype(np.float32)
    out = rewards.generative(jnp.asarray(v))
    first_as_a, second_as_a = v[:, 0, 0] - v[:, 0, 1], v[:, 1, 0] - v[:, 1, 1]
    np.testing.assert_allclose(out["logit"], (first_as_a - second_as_a) / 2, atol=1e-6)
    np.testing.assert_allclose(out["slot_bias"], (first_as_a + second_as_a) / 2, atol=1e-6)
    np.testing.assert_array_equal(out["flip"], (first_as_a > 0) == (second_as_a > 0))
    # The first response favoured as A (row 0) and as B (row 1) is a high logit, not a low one.
    assert rewards.generative(jnp.array([[[5.0, 0.0], [0.0, 5.0]]]))["logit"][0] == 5


def test_generative_symmetries():
    rng = np.random.default_rng(1)
    v = jnp.asarray(rng.normal(0, 3, (50, 2, 2)), jnp.float32)
    out = rewards.generative(v)
    p = jax.nn.sigmoid(out["logit"])
    swapped = rewards.generative(v[:, ::-1])
    np.testing.assert_allclose(jax.nn.sigmoid(swapped["logit"]), 1 - p, atol=1e-6)
    np.testing.assert_array_equal(swapped["slot_bias"], out["slot_bias"])
    same = rewards.generative(v.at[:, 1].set(v[:, 0]))
    np.testing.assert_array_equal(jax.nn.sigmoid(same["logit"]), 0.5)
    # Whatever is added to A in both orders, and to both letters in one order.
    shift = jnp.asarray(rng.normal(0, 4, (50, 1)), jnp.float32)
    biased = rewards.generative(v.at[:, :, 0].add(shift))
    np.testing.assert_allclose(jax.nn.sigmoid(biased["logit"]), p, atol=1e-6)
    np.testing.assert_allclose(biased["slot_bias"], out["slot_bias"] + shift[:, 0], atol=1e-5)
    np.testing.assert_allclose(rewards.generative(v.at[:, 0].add(shift))["logit"], out["logit"], atol=1e-5)


@pytest.mark.parametrize(
    ("z", "flip"), [((1, 1), 1), ((-1, -2), 1), ((1, -1), 0), ((-3, 1), 0), ((0, 1), 0), ((0, 0), 0)]
)
def test_flip_is_the_same_letter_in_both_orders(z, flip):
    verdicts = jnp.array([[[z[0], 0.0], [z[1], 0.0]]])
    assert rewards.generative(verdicts)["flip"][0] == flip


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
    swapped = rewards.implicit(*(x[:, ::-1] for x in (policy, reference, lengths, penalty)), **settings)
    np.testing.assert_allclose(jax.nn.sigmoid(swapped), 1 - jax.nn.sigmoid(found), atol=1e-6)
    level = rewards.implicit(policy, policy, lengths, np.zeros_like(penalty), **settings)
    np.testing.assert_array_equal(jax.nn.sigmoid(level), 0.5)
    # An empty response's reward is finite: its log-ratio is 0.
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


def test_consensus_is_the_weighted_sum_and_templates_share_a_weight():
    logits = np.random.default_rng(4).normal(0, 3, (20, 4)).astype(np.float32)
    np.testing.assert_allclose(
        rewards.consensus(jnp.asarray(logits), (0.5, 0.0, -2.0, 1.0)),
        0.5 * logits[:, 0] - 2 * logits[:, 2] + logits[:, 3],
        atol=1e-5,
    )
    config = configured(
        {
            "generative.templates": ("a", "b"),
            "rewards.models": ("likelihood", "generative", "implicit"),
            "rewards.generative_weight": 3.0,
            "rewards.implicit_weight": 0.5,
            "rewards.likelihood_weight": 0.25,
        }
    )
    assert objective.reward_names(config) == ("likelihood", "generative", "generative", "implicit")
    np.testing.assert_allclose(
        objective.consensus_logits(jnp.asarray(logits), config),
        0.25 * logits[:, 0] + 1.5 * (logits[:, 1] + logits[:, 2]) + 0.5 * logits[:, 3],
        atol=1e-5,
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
    if seed == 4:
        # Rewarded for length, and a real correction.
        assert preferred_gap(0.0, reward, lengths) > 3 > 0.3 > abs(preferred_gap(alpha, reward, lengths))
        assert alpha == pytest.approx(0.2, abs=0.02)


def test_length_penalty_of_nothing_to_balance():
    assert rewards.fit_length_penalty(np.array([[1.0, 0.0]]), np.array([[4, 4]])) == 0
    # Already balanced: nothing is subtracted.
    assert rewards.fit_length_penalty(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[4, 2], [4, 2]])) == 0
    # Shorter ones are preferred: a bonus for length is not given.
    assert rewards.fit_length_penalty(np.array([[0.0, 1.0], [0.0, 2.0]]), np.array([[4, 2], [4, 2]])) == 0
    # The longer ones lead by 3, 1 and 2 tokens; flipping the first of them balances the rest.
    reward, lengths = np.array([[0.3, 0.0], [0.2, 0.0], [18.0, 0.0]]), np.array([[4, 1], [2, 1], [5, 3]])
    alpha = rewards.fit_length_penalty(reward, lengths)
    assert 0.1 < alpha < 0.2 and preferred_gap(alpha, reward, lengths) == 0


# --- consistency -----------------------------------------------------------------------------------------------------

FIXED = ("generative", "implicit", "generative")
PAIRS = 30  # one shape for all, so that operations compile once


def penalties(logits, names, **settings):
    return consistency.penalty(jnp.asarray(logits, jnp.float32), names, **settings)


@pytest.mark.parametrize("target", options("ConsistencyConfig", "target"))
@pytest.mark.parametrize("kind", options("ConsistencyConfig", "kind"))
@pytest.mark.parametrize("models", [1, 2, 3])
def test_penalty_values(kind, target, models):
    logits = np.float32(np.random.default_rng(5).normal(0, 3, (PAIRS, models))).astype(float)
    consensus = np.float32(np.random.default_rng(6).normal(0, 3, PAIRS)).astype(float)
    names = FIXED[:models]
    for sharpen in (0.5, 1.7):
        expected = ref_penalty(logits, logits, names, kind=kind, target=target, consensus=consensus, sharpen=sharpen)
        found = penalties(logits, names, kind=kind, target=target, consensus_P=jnp.float32(consensus), sharpen=sharpen)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("target", options("ConsistencyConfig", "target"))
@pytest.mark.parametrize("stop", options("ConsistencyConfig", "stop_gradient"))
@pytest.mark.parametrize("kind", options("ConsistencyConfig", "kind"))
@pytest.mark.parametrize("models", [2, 3])
def test_penalty_gradients_and_which_columns_learn(kind, stop, target, models):
    rng = np.random.default_rng(7)
    logits = np.float32(rng.normal(0, 2, (PAIRS, models))).astype(float)
    consensus = np.float32(rng.normal(0, 2, PAIRS)).astype(float)
    names = FIXED[:models]
    settings = dict(kind=kind, stop_gradient=stop, target=target)

    def total(logits, consensus):
        return penalties(logits, names, **settings, consensus_P=consensus).sum()

    found, towards = jax.grad(total, argnums=(0, 1))(jnp.float32(logits), jnp.float32(consensus))
    expected = differences(lambda z: ref_penalty(z, logits, names, **settings, consensus=consensus).sum(), logits)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(towards, 0)
    for r, name in enumerate(names):
        assert np.all(found[:, r] == 0) if name == stop else np.all(found[:, r] != 0)
    # Teaching does not change the value.
    np.testing.assert_allclose(
        total(jnp.float32(logits), jnp.float32(consensus)),
        penalties(logits, names, kind=kind, target=target, consensus_P=jnp.float32(consensus)).sum(),
        rtol=1e-6,
    )


@pytest.mark.parametrize("target", options("ConsistencyConfig", "target"))
@pytest.mark.parametrize("kind", options("ConsistencyConfig", "kind"))
@pytest.mark.parametrize("models", [2, 3])
def test_penalty_of_extreme_logits_is_finite_and_right(kind, target, models):
    extremes = [-1e4, -60.0, 0.0, 60.0, 1e4] if models == 2 else [-1e4, 0.0, 60.0]
    logits = np.resize(list(itertools.product(extremes, repeat=models)), (PAIRS, models))
    names = FIXED[:models]
    for consensus in (np.full(len(logits), 1e4), logits[::-1, 0].copy()):
        settings = dict(kind=kind, target=target)

        def total(z):
            values = penalties(z, names, **settings, consensus_P=jnp.float32(consensus))
            return values.sum(), values

        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(jnp.float32(logits))
        assert np.isfinite(found).all() and np.isfinite(gradient).all()
        np.testing.assert_allclose(
            found, ref_penalty(logits, logits, names, **settings, consensus=consensus), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", options("ConsistencyConfig", "kind"))
def test_penalty_does_not_depend_on_the_order_of_responses_or_of_models(kind):
    logits = np.random.default_rng(8).normal(0, 3, (PAIRS, 3)).astype(np.float32)
    value = penalties(logits, FIXED, kind=kind)
    np.testing.assert_allclose(penalties(-logits, FIXED, kind=kind), value, rtol=1e-5, atol=1e-6)
    for order in itertools.permutations(range(3)):
        np.testing.assert_allclose(penalties(logits[:, order], FIXED, kind=kind), value, rtol=1e-5, atol=1e-6)


def test_divergences():
    logits = np.random.default_rng(9).normal(0, 4, (PAIRS, 3)).astype(np.float32)
    equal = np.repeat(logits[:, :1], 3, axis=1)
    two = logits[:, :2]
    for function in (consistency.symmetric_kl, consistency.jensen_shannon):
        assert np.all(np.asarray(function(logits)) > 1e-6) and np.all(np.asarray(function(two)) >= -1e-6)
        np.testing.assert_allclose(function(equal), 0, atol=1e-6)
    forward = consistency.kl(two[:, 0], two[:, 1])
    assert np.all((np.asarray(forward) > 1e-7) | (np.abs(two[:, 0] - two[:, 1]) < 1e-2))
    # Asymmetric, with its target first.
    np.testing.assert_allclose(consistency.kl(jnp.zeros(1), jnp.ones(1) * 4), -np.log(2) - table(4.0).mean(), atol=1e-5)
    np.testing.assert_allclose(
        consistency.symmetric_cross_entropy(logits),
        consistency.symmetric_kl(logits) + consistency.entropy(logits).mean(axis=1),
        rtol=1e-5,
        atol=1e-6,
    )
    apart = jnp.array([[1e4, -1e4], [50.0, -50.0], [3.0, -2.0]])
    js = np.asarray(consistency.jensen_shannon(apart))
    np.testing.assert_allclose(js[:2], np.log(2), atol=1e-6)
    assert np.all(np.asarray(consistency.jensen_shannon(logits)) <= np.log(2) + 1e-6) and js[2] < np.log(2)
    np.testing.assert_allclose(consistency.entropy(jnp.array([0.0, 1e4, -1e4])), [np.log(2), 0, 0], atol=1e-7)
    # Confidence: agreement and cross-entropy ask for it, symmetric KL does not.
    sure, unsure = jnp.array([[9.0, 9.0]]), jnp.array([[0.1, 0.1]])
    for kind in ("cross_entropy", "agreement", "pseudo_label"):
        assert penalties(sure, FIXED[:2], kind=kind)[0] < 0.01 < 0.5 < penalties(unsure, FIXED[:2], kind=kind)[0]
    np.testing.assert_allclose(
        consistency.agreement(jnp.array([[1e4, 1e4], [-1e4, -1e4], [0.0, 0.0]])), [0, 0, np.log(2)], atol=1e-6
    )


# --- preference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("kind", options("PreferenceConfig", "loss"))
def test_preference_loss(kind, smoothing):
    rng = np.random.default_rng(10)
    margin = np.float32(rng.normal(0, 8, 60)).astype(float)
    q = np.float32(np.concatenate([np.repeat([0.0, 1.0, 0.5], 10), rng.uniform(0, 1, 30)])).astype(float)
    for beta in (0.1, 0.7):
        settings = dict(kind=kind, beta=beta, label_smoothing=smoothing)
        expected = functools.partial(ref_loss, **settings)
        np.testing.assert_allclose(
            preference.loss(jnp.float32(margin), jnp.float32(q), **settings), expected(margin, q), rtol=1e-5, atol=1e-5
        )
        found = jax.grad(lambda m: preference.loss(m, jnp.float32(q), **settings).sum())(jnp.float32(margin))
        np.testing.assert_allclose(found, differences(lambda m: expected(m, q).sum(), margin), rtol=1e-3, atol=1e-5)
        # Swapping the responses swaps the label.
        np.testing.assert_allclose(
            preference.loss(jnp.float32(-margin), jnp.float32(1 - q), **settings),
            expected(margin, q),
            rtol=1e-5,
            atol=1e-5,
        )


def test_preference_loss_at_the_start_and_far_away():
    at_zero = functools.partial(preference.loss, jnp.zeros(3), jnp.array([0.0, 1.0, 0.3]), beta=0.1)
    np.testing.assert_allclose(at_zero(kind="sigmoid"), np.log(2), atol=1e-7)
    np.testing.assert_allclose(at_zero(kind="sigmoid", label_smoothing=0.2), np.log(2), atol=1e-7)
    np.testing.assert_allclose(at_zero(kind="ipo"), 25, rtol=1e-6)
    np.testing.assert_allclose(at_zero(kind="hinge"), 1, atol=1e-7)
    far = jnp.array([1e5, -1e5])
    value, gradient = jax.value_and_grad(lambda m: preference.loss(m, jnp.ones(2), kind="sigmoid", beta=0.1).sum())(far)
    assert value == pytest.approx(1e4) and np.array_equal(gradient, np.float32([0, -0.1]))


@pytest.mark.parametrize("per_token", [False, True])
def test_margin(per_token):
    policy, reference = np.random.default_rng(11).normal(-20, 9, (2, 30, 2)).astype(np.float32)
    lengths = np.random.default_rng(12).integers(1, 30, (30, 2))
    ratio = (policy.astype(float) - reference) / (lengths if per_token else 1)
    found = preference.margin(policy, reference, lengths, length_normalised=per_token)
    np.testing.assert_allclose(found, ratio[:, 0] - ratio[:, 1], atol=1e-5)
    np.testing.assert_array_equal(preference.margin(policy, policy, lengths, length_normalised=per_token), 0)


@pytest.mark.parametrize(
    ("logits", "confidence", "expected"),
    [
        ([1, 2, 3], 0.0, True),
        ([-1, -2, -3], 0.0, True),
        ([1, 2, -3], 0.0, False),
        ([-1, 2, 3], 0.0, False),
        ([1e-12, 1, 1], 0.0, True),  # a side, though the probability rounds to 1/2
        ([0, 1, 1], 0.0, False),  # exactly 1/2 is no side
        ([0, 0, 0], 0.0, False),
        ([1e4, 1e4, 1e4], 0.0, True),
        ([2, 2, 2], 0.3, True),  # sigmoid(2) = 0.88
        ([2, 2, 1], 0.3, False),  # sigmoid(1) = 0.73
        ([-2, -2, -1], 0.3, False),
        ([-2, -2, -2], 0.3, True),
        ([1e4, -1e4, 1e4], 0.3, False),
        ([0, 0, 0], 0.3, False),
        ([1], 0.0, True),
    ],
)
def test_agreement_rule(logits, confidence, expected):
    assert preference.agreed(jnp.array([logits], jnp.float32), confidence).tolist() == [expected]


def test_confidence_boundary_is_not_enough():
    p = 0.75
    at = np.log(p / (1 - p))
    just = jnp.array([[at + 1e-4, -at - 1e-4], [at - 1e-4, -at + 1e-4]], jnp.float32).T.reshape(-1, 1)
    assert preference.agreed(just, 0.25).tolist() == [True, False, True, False]


def test_hard_and_soft_labels_have_no_gradient():
    logits = jnp.array([3.0, -0.2, 0.0, 1e-12, -1e4])
    np.testing.assert_array_equal(preference.label(logits, soft=False), [1, 0, 0.5, 1, 0])
    np.testing.assert_allclose(preference.label(logits, soft=True), np.exp(table(logits)[:, 0]), atol=1e-6)
    for soft in (False, True):
        np.testing.assert_array_equal(jax.grad(lambda z: preference.label(z, soft=soft).sum())(logits), 0)


# --- the whole objective ---------------------------------------------------------------------------------------------

VARIED = {
    "rewards.models": [
        ("generative", "implicit"),
        ("implicit", "generative"),
        ("generative", "implicit", "likelihood"),
        ("generative",),
        ("implicit",),
        ("likelihood", "generative"),
    ],
    "generative.templates": [("a",), ("a", "b")],
    "rewards.likelihood_length": options("RewardsConfig", "likelihood_length"),
    "rewards.generative_weight": [1.0, 0.4],
    "rewards.implicit_weight": [0.3, -0.2],
    "rewards.likelihood_weight": [0.1, 0.05],
    "implicit.beta": [0.1, 0.4],
    "implicit.length": options("ImplicitConfig", "length"),
    "consistency.kind": options("ConsistencyConfig", "kind"),
    "consistency.stop_gradient": options("ConsistencyConfig", "stop_gradient"),
    "consistency.target": options("ConsistencyConfig", "target"),
    "consistency.weight": [1.0, 2.5, 0.0],
    "consistency.sharpen": [0.5, 1.3],
    "selection.rule": options("SelectionConfig", "rule"),
    "selection.confidence": [0.0, 0.1],
    "preference.loss": options("PreferenceConfig", "loss"),
    "preference.beta": [0.1, 0.3],
    "preference.weight": [1.0, 0.6],
    "preference.label_smoothing": [0.0, 0.1],
    "preference.length_normalised": [False, True],
    "preference.labels": options("PreferenceConfig", "labels"),
    "preference.soft": [False, True],
    "preference.update": options("PreferenceConfig", "update"),
}
CONFIGURATIONS = 24


def random_settings():
    """Settings in which every value of every key occurs about equally often, in random combinations."""
    rng = np.random.default_rng(13)
    columns = {}
    for name, values in VARIED.items():
        places = rng.permutation(np.arange(CONFIGURATIONS) % len(values))
        columns[name] = [values[i] for i in places]
    result = []
    for i in range(CONFIGURATIONS):
        chosen = {name: values[i] for name, values in columns.items()}
        models, labels = chosen["rewards.models"], chosen["preference.labels"]
        if labels in ("generative", "implicit") and labels not in models:
            chosen["preference.update"] = "dynamic"  # frozen logits are there for the set only
        result.append(chosen)
    return result


@pytest.mark.parametrize("number", range(CONFIGURATIONS))
def test_objective_in_random_settings(number):
    config = configured(random_settings()[number])
    values = example(config, seed=100 + number)
    loss, sums, decisions, gradients = value_and_grad(values, config)
    expected, expected_sums, expected_decisions = ref_objective(values, values, config)

    assert loss == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert set(sums) == set(expected_sums)
    for name, (total, count) in sums.items():
        assert count == expected_sums[name][1], name
        assert total == pytest.approx(expected_sums[name][0], rel=2e-5, abs=2e-5), name
    assert set(decisions) == set(expected_decisions)
    for name, value in decisions.items():
        real = slice(None) if name == "selected" else slice(5)
        np.testing.assert_allclose(
            np.float64(value)[real], np.float64(expected_decisions[name])[real], atol=1e-6, err_msg=name
        )
    for name, found in gradients.items():
        numeric = differences(lambda x: ref_objective({**values, name: x}, values, config)[0], values[name])
        scale = max(np.abs(numeric).max(), 1e-3)
        np.testing.assert_allclose(found, numeric, rtol=5e-4, atol=2e-5 * scale, err_msg=name)


def test_random_settings_reach_both_outcomes():
    selected = [
        ref_objective(v, v, c)[1]["selected"]
        for i, s in enumerate(random_settings())
        for c in [configured(s)]
        for v in [example(c, 100 + i)]
    ]
    assert {int(total) for total, _ in selected} >= {2, 3, 4} and all(count == 5 for _, count in selected)


def test_the_agreed_side_is_the_label():
    config = configured({"generative.templates": ("a", "b")})
    values = example(config, 1, pairs=64, real=64)
    _, decisions = objective.objective(as_pairs(values), config)
    sides = np.concatenate([decisions["p_generative"], decisions["p_implicit"][:, None]], axis=1)
    agreed = np.all(sides > 0.5, axis=1) | np.all(sides < 0.5, axis=1)
    np.testing.assert_array_equal(decisions["agreed"], agreed)
    np.testing.assert_array_equal(decisions["selected"], agreed)
    np.testing.assert_array_equal(decisions["label"][agreed], sides[agreed, 0] > 0.5)
    assert 10 < agreed.sum() < 54


@pytest.mark.parametrize("update", options("PreferenceConfig", "update"))
@pytest.mark.parametrize("labels", options("PreferenceConfig", "labels"))
def test_whose_label(labels, update):
    """Columns of known sign: every source of labels tells itself apart."""
    config = configured(
        {
            "rewards.models": ("generative", "implicit", "likelihood"),
            "rewards.generative_weight": 1.0,
            "rewards.implicit_weight": 3.0,
            "rewards.likelihood_weight": 1.0,
            "preference.labels": labels,
            "preference.update": update,
            "selection.rule": "all",
        }
    )
    signs = np.array(list(itertools.product([-1, 1], repeat=6)), float)  # live g, i, l; frozen g, i, l
    values = example(config, 2, pairs=len(signs), real=len(signs))
    g, i, likelihood = signs[:, 0], 1.5 * signs[:, 1], 4 * signs[:, 2]
    values["verdicts"] = np.zeros((len(signs), 1, 2, 2))
    values["verdicts"][:, 0, 0, 0] = 2 * g
    values["implicit_logps"] = np.zeros((len(signs), 2))
    values["logps"] = np.stack([i / config.implicit.beta, 0 * i], axis=1)
    values["start_logps"] = np.stack([likelihood, 0 * i], axis=1)
    values["frozen_logits"] = signs[:, 3:] * [1, 1.5, 4]
    values["external"] = np.arange(len(signs)) % 3 / 2
    live, frozen = np.stack([g, i, likelihood], axis=1), values["frozen_logits"]
    source = frozen if update == "frozen" else live
    expected = {
        "agreement": source.sum(axis=1) > 0,
        "generative": source[:, 0] > 0,
        "implicit": source[:, 1] > 0,
        "likelihood": live[:, 2] > 0,
        "consensus": source @ [1, 3, 1] > 0,
        "external": values["external"],
        "cream": values["external"],
    }[labels]
    decisions = objective.objective(as_pairs(values), config)[1]
    np.testing.assert_array_equal(decisions["label"], expected)
    if labels not in ("external", "cream"):
        soft = dataclasses.replace(config, preference=dataclasses.replace(config.preference, soft=True))
        label = np.asarray(objective.objective(as_pairs(values), soft)[1]["label"])
        np.testing.assert_array_equal(label > 0.5, expected)
        assert np.all((label > 0) & (label < 1))


def test_no_selected_pair_is_no_loss_and_no_gradient():
    config = configured({"consistency.weight": 0.0})
    values = example(config, 3)
    values["verdicts"] = np.abs(values["verdicts"])
    values["verdicts"][:, 0, 0, 1] = values["verdicts"][:, 0, 1, 0] = 0
    values["logps"] = np.stack([-50 + 0 * values["logps"][:, 0], 0 * values["logps"][:, 1]], axis=1)
    loss, sums, decisions, gradients = value_and_grad(values, config)
    assert not decisions["selected"].any() and sums["preference"] == (0, 0)
    assert loss == 0
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


def test_identical_responses_are_never_selected():
    for rule in options("SelectionConfig", "rule"):
        for soft in (False, True):
            config = configured({"selection.rule": rule, "preference.soft": soft})
            decisions = value_and_grad(example(config, 4), config)[2]
            assert not decisions["selected"][1] and not decisions["agreed"][1] and decisions["label"][1] == 0.5


@pytest.mark.parametrize("number", [0, 5, 11, 17])
@pytest.mark.parametrize("junk", [7.5, np.nan, np.inf])
def test_padded_pairs_change_nothing(number, junk):
    """Whatever is in them, NaN and infinity among it."""
    config = configured({**random_settings()[number], "consistency.weight": 1.0})
    values = example(config, 200 + number)
    filled = {name: value.copy() for name, value in values.items()}
    for name, value in filled.items():
        if name not in ("weight", "lengths"):
            value[5:] = junk
    loss, sums, _, gradients = value_and_grad(values, config)
    padded_loss, padded_sums, decisions, padded_gradients = value_and_grad(filled, config)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    for name, (total, count) in sums.items():
        assert padded_sums[name][0] == pytest.approx(total, rel=1e-6, abs=1e-6) and padded_sums[name][1] == count
    assert not decisions["selected"][5:].any()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(padded_gradients[name][:5], gradient[:5], rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(padded_gradients[name][5:], 0)


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_sums_of_parts_are_the_sums_of_the_whole(number):
    config = configured(random_settings()[number])
    values = example(config, 300 + number, real=7)
    whole = value_and_grad(values, config)[1]
    parts = [
        value_and_grad({**values, "weight": np.float64(weight)}, config)[1]
        for weight in ([1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 1, 0], [0] * 6 + [1])
    ]
    for name, (total, count) in whole.items():
        assert sum(part[name][0] for part in parts) == pytest.approx(float(total), rel=1e-5, abs=1e-5), name
        assert sum(part[name][1] for part in parts) == count, name


@pytest.mark.parametrize("number", [4, 6, 9, 14])
def test_swapping_every_pair_changes_no_loss(number):
    config = configured(random_settings()[number])
    values = example(config, 400 + number)
    swapped = {n: v[:, ::-1] if v.shape[1:] == (2,) and n != "frozen_logits" else v for n, v in values.items()}
    swapped["verdicts"] = values["verdicts"][:, :, ::-1]
    swapped["frozen_logits"] = -values["frozen_logits"]
    swapped["external"] = 1 - values["external"]
    loss, _, decisions, gradients = value_and_grad(values, config)
    loss_, _, decisions_, gradients_ = value_and_grad(swapped, config)
    assert loss_ == pytest.approx(float(loss), rel=1e-5)
    for name in ("p_generative", "p_implicit", "label"):
        np.testing.assert_allclose(decisions_[name][:5], 1 - decisions[name][:5], atol=1e-6)
    for name in ("agreed", "selected"):
        np.testing.assert_array_equal(decisions_[name][:5], decisions[name][:5])
    np.testing.assert_allclose(gradients_["logps"], gradients["logps"][:, ::-1], atol=1e-6)
    np.testing.assert_allclose(gradients_["verdicts"], gradients["verdicts"][:, :, ::-1], atol=1e-6)


def test_total_weighs_the_means_of_the_terms():
    sums = {
        "preference": (jnp.float32(6), jnp.float32(4)),
        "consistency": (jnp.float32(5), jnp.float32(10)),
        "sft/ift": (jnp.float32(8), jnp.float32(2)),
        "sft/eft": (jnp.float32(0), jnp.float32(0)),
        "agreement": (jnp.float32(1e9), jnp.float32(1)),
    }
    config = configured({"preference.weight": 2.0, "consistency.weight": 3.0, "replay.weight": 0.5})
    assert objective.total(sums, config, ("sft/ift", "sft/eft")) == pytest.approx(2 * 1.5 + 3 * 0.5 + 0.5 * 4)
    assert objective.total(sums, config) == pytest.approx(4.5)
    # A term that is left out may be anything.
    off = configured({"preference.weight": 2.0, "consistency.weight": 0.0})
    assert objective.total({**sums, "consistency": (jnp.float32(np.nan), jnp.float32(1))}, off) == pytest.approx(3)


def test_division_by_a_count_of_nothing():
    assert objective.divide(jnp.float32(0), jnp.float32(0)) == 0
    assert jax.grad(objective.divide)(jnp.float32(0), jnp.float32(0)) == 0
    assert objective.divide(jnp.float32(3), jnp.float32(2)) == 1.5


def test_rank_agreement_counts_pairs_of_responses_in_the_same_order():
    rng = np.random.default_rng(3)
    first, second = ([rng.normal(size=n) for n in (2, 5, 4, 1)] for _ in range(2))
    shares = []
    for x, y in zip(first[:3], second[:3], strict=True):
        pairs = [(i, j) for i in range(len(x)) for j in range(i)]
        shares.append(sum((x[i] > x[j]) == (y[i] > y[j]) for i, j in pairs) / len(pairs))
    assert rewards.rank_agreement(first, second) == pytest.approx(np.mean(shares), abs=1e-12)
    assert rewards.rank_agreement(first[:3], first[:3]) == 1
    assert rewards.rank_agreement(first[:3], [-x for x in first[:3]]) == 0
    assert rewards.rank_agreement([np.zeros(1)], [np.zeros(1)]) == 0.5
