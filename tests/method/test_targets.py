"""Frozen targets of the consistency penalty by hand and by brute force."""

from itertools import combinations
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from scir_jax.method import targets
from scir_jax.method.rewards import columns
from scir_jax.method.targets import TARGETS
from tests.method_reference import configured


def test_lagged_by_hand():
    """Two templates each; probabilities 3/4 and 1/4, 3/4 and 3/4, 1/2 and 4/5."""
    three, four = np.log(3), np.log(4)
    frozen = {
        "generative": jnp.array([[three + 1, three - 1], [three, three], [0.0, 0.0]]),
        "generative_before": jnp.array([[-three, -three], [three - 2, three + 2], [four, four]]),
    }
    target = TARGETS["lagged"]
    evidence = SimpleNamespace(frozen=frozen)
    np.testing.assert_allclose(target.logits(evidence, configured({})), [0, three, four / 2], atol=1e-6)
    np.testing.assert_allclose(target.weight(evidence), [0.5, 1, 0.7], atol=1e-6)
    config = configured({"generative.templates": ("a", "b")})
    assert [columns(name, config) for name in target.frozen(config)] == [2, 2]


def test_labels_by_hand():
    """Certain labels have a finite logit, and a label that says nothing does not count."""
    evidence = SimpleNamespace(label=jnp.array([1.0, 0.0, 0.5, 0.75]))
    target = TARGETS["labels"]
    np.testing.assert_allclose(target.logits(evidence, configured({})), [16, -16, 0, np.log(3)], atol=1e-6)
    np.testing.assert_array_equal(target.weight(evidence), [1, 1, 0, 1])


def test_transitive_by_hand():
    """Rock beats paper by 2, paper beats scissors by 1, scissors beat rock by 3: the mean verdicts say otherwise."""
    places, logits = [(0, 1), (1, 2), (2, 0)], np.array([2.0, 1.0, 3.0])
    # Means: rock (2 - 3) / 2, paper (-2 + 1) / 2, scissors (-1 + 3) / 2.
    np.testing.assert_allclose(targets.transitive(places, logits), [0, -1.5, 1.5])
    assert targets.transitive([], np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("sizes", [(2,), (4, 3), (5, 2, 6)])
def test_transitive_is_the_difference_of_mean_verdicts(sizes):
    rng = np.random.default_rng(0)
    order = rng.permutation(sum(sizes)).tolist()
    pairs, groups = [], []
    for size in sizes:
        groups.append([order.pop() for _ in range(size)])
        pairs += [(a, b) if rng.random() < 0.5 else (b, a) for a, b in combinations(groups[-1], 2)]
    logits = rng.normal(size=len(pairs))
    z = {(a, b): x for (a, b), x in zip(pairs, logits)}

    def score(i, group):
        return np.mean([z[i, j] if (i, j) in z else -z[j, i] for j in group if j != i])

    group_of = {i: group for group in groups for i in group}
    expected = [score(a, group_of[a]) - score(b, group_of[b]) for a, b in pairs]
    found = targets.transitive(pairs, logits)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # No circle: along any three answers the differences add up.
    d = {pair: x for pair, x in zip(pairs, found)} | {(b, a): -x for (a, b), x in zip(pairs, found)}
    for group in groups:
        for i, j, k in combinations(group, 3):
            assert d[i, j] + d[j, k] == pytest.approx(d[i, k])
    # Verdicts that are differences of scores already keep their order, and of two answers their value.
    scores = rng.normal(size=sum(sizes))
    true = np.array([scores[a] - scores[b] for a, b in pairs])
    assert np.all(np.sign(targets.transitive(pairs, true)) == np.sign(true))
    if sizes == (2,):
        np.testing.assert_allclose(targets.transitive(pairs, true), 2 * true)
