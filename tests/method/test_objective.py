"""The whole objective against float64 NumPy in random settings, and what must not change it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.method import objective
from tests.method_reference import (
    CONFIGURATIONS,
    configured,
    differences,
    evidence,
    example,
    options,
    random_settings,
    ref_objective,
    swapped,
    value_and_grad,
)

KINDS = options("ConsistencyConfig", "kind")


@pytest.mark.parametrize("number", range(CONFIGURATIONS))
def test_objective_in_random_settings(number):
    config = configured(random_settings()[number])
    values = example(config, seed=100 + number, weighted=number % 2 == 1)
    loss, sums, decisions, gradients = value_and_grad(values, config)
    expected, expected_sums, expected_decisions = ref_objective(values, values, config)

    assert loss == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert set(sums) == set(expected_sums)
    for name, (total, count) in sums.items():
        assert count == pytest.approx(expected_sums[name][1], rel=1e-5), name
        assert total == pytest.approx(expected_sums[name][0], rel=2e-5, abs=2e-5), name
    assert set(decisions) == set(expected_decisions)
    for name, value in decisions.items():
        real = slice(None) if name in ("selected", "weight") else slice(5)
        np.testing.assert_allclose(
            np.float64(value)[real], np.float64(expected_decisions[name])[real], atol=2e-6, err_msg=name
        )
    for name in ("logps", "verdicts", "entropy"):
        numeric = differences(lambda x: ref_objective({**values, name: x}, values, config)[0], values[name])
        scale = max(np.abs(numeric).max(), 1e-3)
        # Nothing depends on what the step does not read: on what the judge would say, where it is not asked.
        found = gradients.get(name, np.zeros_like(numeric))
        np.testing.assert_allclose(found, numeric, rtol=5e-4, atol=2e-5 * scale, err_msg=name)
    if "verdict_mass" in gradients:
        np.testing.assert_array_equal(gradients["verdict_mass"], 0)


def test_random_settings_reach_both_outcomes():
    configs = [configured(settings) for settings in random_settings()]
    sums = [
        ref_objective(values, values, config)[1]
        for number, config in enumerate(configs)
        for values in [example(config, 100 + number)]
    ]
    selected = [found["selected"] for found in sums]
    assert {int(total) for total, _ in selected} >= {2, 3, 4} and all(count == 5 for _, count in selected)
    assert {objective.needs(config).asks_judge for config in configs} == {True, False}


def test_the_agreed_side_is_the_label():
    config = configured({"generative.templates": ("a", "b")})
    values = example(config, 1, pairs=64, real=64)
    _, decisions = objective.objective(evidence(values, config), config)
    sides = np.concatenate([decisions["p_generative"], decisions["p_implicit"][:, None]], axis=1)
    agreed = np.all(sides > 0.5, axis=1) | np.all(sides < 0.5, axis=1)
    np.testing.assert_array_equal(decisions["agreed"], agreed)
    np.testing.assert_array_equal(decisions["selected"], agreed)
    np.testing.assert_array_equal(decisions["label"][agreed], sides[agreed, 0] > 0.5)
    assert 10 < agreed.sum() < 54


def test_no_selected_pair_is_no_loss_and_no_gradient():
    config = configured({"consistency.weight": 0.0})
    values = example(config, 3)
    values["verdicts"] = np.abs(values["verdicts"])
    values["verdicts"][:, 0, 0, 1] = values["verdicts"][:, 0, 1, 0] = 0
    values["logps"] = np.stack([-50 + 0 * values["logps"][:, 0], 0 * values["logps"][:, 1]], axis=1)
    loss, sums, decisions, gradients = value_and_grad(values, config)
    assert not decisions["selected"].any() and sums["preference"] == (0, 0)
    assert loss == 0 and {"logps", "verdicts"} <= set(gradients)
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("templates", [("a",), ("a", "b")])
def test_one_order_counts_like_two_that_say_the_same(kind, templates):
    """The other order's verdict mirrored: its letters exchanged, as a judge without a bias for a slot would answer."""
    config = configured({"consistency.kind": kind, "generative.templates": templates})
    values = example(config, 9, pairs=16, real=12)
    one = values | {name: values[name][:, :, :1] for name in ("verdicts", "verdict_mass")}
    two = {name: np.concatenate([one[name]] * 2, axis=2) for name in ("verdicts", "verdict_mass")}
    two["verdicts"][:, :, 1] = two["verdicts"][:, :, 1, ::-1]
    loss, sums, decisions, gradients = value_and_grad(one, config)
    expected, expected_sums, expected_decisions, expected_gradients = value_and_grad(values | two, config)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert set(expected_sums) - set(sums) == {"generative/slot_bias", "generative/flip_rate"}
    for name, (total, count) in sums.items():
        assert (total, count) == pytest.approx(expected_sums[name], rel=1e-5, abs=1e-5), name
    for name, value in decisions.items():
        np.testing.assert_allclose(value, expected_decisions[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(gradients["logps"], expected_gradients["logps"], atol=1e-6)
    both = expected_gradients["verdicts"][:, :, :1] + expected_gradients["verdicts"][:, :, 1:, ::-1]
    np.testing.assert_allclose(gradients["verdicts"], both, atol=1e-6)


def test_identical_answers_are_never_selected():
    for rule in options("SelectionConfig", "rule"):
        for soft in (False, True):
            config = configured({"selection.rule": rule, "preference.soft": soft})
            decisions = value_and_grad(example(config, 4), config)[2]
            assert not decisions["selected"][1] and decisions["weight"][1] == 0
            assert not decisions["agreed"][1] and decisions["label"][1] == 0.5


@pytest.mark.parametrize("number", [0, 5, 11, 17])
@pytest.mark.parametrize("junk", [7.5, np.nan, np.inf])
def test_padded_pairs_change_nothing(number, junk):
    """Whatever is in them, NaN and infinity among it."""
    config = configured({**random_settings()[number], "consistency.weight": 1.0})
    values = example(config, 200 + number, weighted=True)
    filled = {name: value.copy() for name, value in values.items()}
    for name, value in filled.items():
        if name not in ("weight", "lengths"):
            value[5:] = junk
    loss, sums, _, gradients = value_and_grad(values, config)
    padded_loss, padded_sums, decisions, padded_gradients = value_and_grad(filled, config)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    for name, (total, count) in sums.items():
        assert padded_sums[name] == pytest.approx((total, count), rel=1e-6, abs=1e-6), name
    assert not decisions["selected"][5:].any() and not decisions["weight"][5:].any()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(padded_gradients[name][:5], gradient[:5], rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(padded_gradients[name][5:], 0)


def test_nothing_but_padding_is_no_loss():
    config = configured({})
    loss, sums, decisions, gradients = value_and_grad(example(config, 5, real=0), config)
    assert loss == 0 and not decisions["selected"].any()
    assert all(pair == (0, 0) for pair in sums.values())
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


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
        assert sum(part[name][1] for part in parts) == pytest.approx(count, rel=1e-5), name


@pytest.mark.parametrize("number", [0, 2, 7, 13])
def test_a_weight_is_so_many_copies_of_a_pair(number):
    """In every term and metric; and that all weights are doubled changes no mean."""
    config = configured(random_settings()[number])
    values = example(config, 500 + number)
    copies = np.array([2, 1, 3, 1, 0, 0, 0])
    copied = {name: np.repeat(value, copies, axis=0) for name, value in values.items()}
    weighted = {**values, "weight": copies.astype(float)}
    loss, sums, _, gradients = value_and_grad(copied, config)
    loss_, sums_, decisions_, gradients_ = value_and_grad(weighted, config)
    assert loss_ == pytest.approx(loss, rel=1e-5)
    assert set(sums) == set(sums_)
    for name, (total, count) in sums.items():
        assert sums_[name][0] == pytest.approx(total, rel=1e-5, abs=1e-5), name
        assert sums_[name][1] == pytest.approx(count, rel=1e-5), name
    starts = np.cumsum(copies) - copies
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradients_[name][:4], np.add.reduceat(gradient, starts[:4]), rtol=1e-5, atol=1e-6)
    if config.selection.rule != "certainty":
        np.testing.assert_array_equal(decisions_["weight"], copies * decisions_["selected"])

    loss_, sums_, _, gradients_ = value_and_grad({**values, "weight": 0.125 * copies}, config)
    assert loss_ == pytest.approx(loss, rel=1e-5)
    for name, (total, count) in sums.items():
        assert sums_[name] == pytest.approx((total / 8, count / 8), rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("number", [4, 6, 9, 14, 15, 20])
def test_swapping_every_pair_changes_no_loss(number):
    config = configured(random_settings()[number])
    values = example(config, 400 + number, weighted=True)
    loss, sums, decisions, gradients = value_and_grad(values, config)
    loss_, sums_, decisions_, gradients_ = value_and_grad(swapped(values), config)
    assert loss_ == pytest.approx(float(loss), rel=1e-5)
    for name, pair in sums.items():
        assert sums_[name] == pytest.approx(pair, rel=1e-5, abs=1e-5), name
    for name, value in decisions.items():
        if name == "label" or name.startswith("p_"):
            np.testing.assert_allclose(decisions_[name][:5], 1 - value[:5], atol=1e-6)
        else:  # agreed, selected, weight
            np.testing.assert_allclose(np.float64(decisions_[name][:5]), np.float64(value[:5]), rtol=1e-5)
    np.testing.assert_allclose(gradients_["logps"], gradients["logps"][:, ::-1], atol=1e-6)
    if "verdicts" in gradients:
        np.testing.assert_allclose(gradients_["verdicts"], gradients["verdicts"][:, :, ::-1], atol=1e-6)
    if "entropy" in gradients:
        np.testing.assert_allclose(gradients_["entropy"], gradients["entropy"][:, ::-1], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "target", "loss_kind", "soft"),
    [
        *itertools.product(KINDS, ["mutual", "consensus"], ["sigmoid"], [True]),
        *itertools.product(["kl"], ["mutual"], options("PreferenceConfig", "loss"), [False]),
    ],
)
def test_certain_predictions_have_finite_losses_and_gradients(kind, target, loss_kind, soft):
    """Logits as far as float32 models go, of all signs, agreeing and not."""
    config = configured(
        {
            "consistency.kind": kind,
            "consistency.target": target,
            "preference.loss": loss_kind,
            "preference.soft": soft,
            "preference.label_smoothing": 0.1,
            "selection.rule": "all",
            "implicit.beta": 1.0,
        }
    )
    signs = np.array(list(itertools.product([-1, 0, 1], repeat=3)), float)
    values = example(config, 6, pairs=len(signs), real=len(signs))
    values["verdicts"][:, 0, 0, 0] += 3e3 * signs[:, 0]
    values["logps"][:, 0] += 2e4 * signs[:, 1]
    values |= {f"frozen {name}": 5e3 * signs[:, 2:] for name in config.rewards.models}
    loss, sums, _, gradients = value_and_grad(values, config)
    assert loss == pytest.approx(ref_objective(values, values, config)[0], rel=1e-5)
    assert all(np.isfinite(pair).all() for pair in sums.values())
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert np.abs(gradients["logps"]).max() > 0


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
    assert objective.divide(jnp.float32(1e-3), jnp.float32(1e-3)) == 1
