"""Which answers of a prompt are compared: every way against a slow one that knows nothing of the other."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from scir_jax.method.pairing import (
    PAIRING,
    Choice,
    Scores,
    all_pairs,
    best_worst,
    cream,
    dice,
    ordinal,
    random_pairs,
    rank_agreement,
)
from tests.method_reference import configured


def groups_of(rng, sizes):
    """Groups of places that lie among each other, in random order."""
    places = rng.permutation(sum(sizes)).tolist()
    return [[places.pop() for _ in range(size)] for size in sizes]


def scores_of(rng, answers, candidates=(), *, reference_before=False, levels=None):
    """Random scores; with `levels` they are whole numbers below it, so that many are equal."""

    def draw(*shape):
        return rng.normal(-20, 5, shape) if levels is None else rng.integers(-levels, 0, shape).astype(float)

    roles = ("start", "preference", "implicit", "before")
    wins = rng.uniform(0, 1, len(candidates)) if levels is None else rng.integers(0, 3, len(candidates)) / 2
    logps = {role: draw(answers) for role in roles}
    return Scores(logps, rng.integers(0, 9, answers), rng.integers(0, 40, answers), wins, reference_before)


# --- candidates ------------------------------------------------------------------------------------------------------


def test_all_pairs_are_every_two_answers_once():
    rng = np.random.default_rng(0)
    groups = groups_of(rng, (4, 1, 2, 0, 6, 3))
    found = all_pairs(groups, rng, configured({}))
    expected = [{a, b} for group in groups for i, a in enumerate(group) for b in group[:i]]
    assert sorted(map(sorted, ({pair.a, pair.b} for pair in found))) == sorted(map(sorted, expected))
    assert all(pair.label is None for pair in found)
    # The groups' order is kept, so that the pairs of a prompt lie together.
    number = {place: n for n, group in enumerate(groups) for place in group}
    assert [number[pair.a] for pair in found] == sorted(number[pair.a] for pair in found)


@pytest.mark.parametrize("per_prompt", [1, 2, 5, 30])
def test_random_pairs_are_so_many_different_ones_of_each_prompt(per_prompt):
    rng = np.random.default_rng(1)
    groups = groups_of(rng, (4, 1, 2, 0, 6, 3))
    found = random_pairs(groups, rng, configured({"pairs.per_prompt": per_prompt}))
    for group in groups:
        mine = [frozenset((pair.a, pair.b)) for pair in found if pair.a in group or pair.b in group]
        assert len(mine) == len(set(mine)) == min(per_prompt, len(group) * (len(group) - 1) // 2)
        assert all(len(pair) == 2 and pair <= set(group) for pair in mine)


def test_every_pair_in_every_order_is_as_likely():
    rng, config = np.random.default_rng(2), configured({"pairs.per_prompt": 2})
    group, draws = (7, 3, 5), 3000
    counts = Counter((pair.a, pair.b) for _ in range(draws) for pair in random_pairs([group], rng, config))
    assert set(counts) == set(permutations(group, 2))
    # Each of six ordered pairs is one of the two that are drawn with probability 1/3.
    assert all(abs(count / draws - 1 / 3) < 5 * np.sqrt(2 / 9 / draws) for count in counts.values()), counts


def test_candidates_depend_on_the_generator_alone():
    groups = groups_of(np.random.default_rng(3), (5, 4, 3))
    for name, way in PAIRING.items():
        config = configured({"pairs.kind": name})
        first, again = (way.candidates(groups, np.random.default_rng(4), config) for _ in range(2))
        assert first == again
        if name == "random":
            assert first != way.candidates(groups, np.random.default_rng(5), config)


# --- best against worst ----------------------------------------------------------------------------------------------


def slow_best_worst(groups, candidates, scores, config):
    """(pair, as a set of places) of each prompt in turn."""
    result = []
    for group in groups:
        if len(group) < 2:
            continue
        raw = {}
        for i in group:
            tokens = max(scores.lengths[i], 1) if config.rewards.likelihood_length == "mean" else 1
            raw[i] = scores.logps["start"][i] / tokens
        mean = sum(raw.values()) / len(raw)
        deviation = (sum((x - mean) ** 2 for x in raw.values()) / len(raw)) ** 0.5
        rank = {}
        for i in group:
            won = [p if pair.a == i else 1 - p for pair, p in zip(candidates, scores.wins) if i in (pair.a, pair.b)]
            assert len(won) == len(group) - 1
            rank[i] = sum(won) / len(won)
            if deviation:
                rank[i] += config.pairs.likelihood_weight * (raw[i] - mean) / deviation
        # Of equal answers the one at the earlier place counts as the better one.
        order = sorted(group, key=lambda i: (-round(rank[i], 9), i))
        best, others = order[0], order[1:]
        result += [{best, worst} for worst in others[::-1][: config.pairs.per_prompt]]
    return result


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("length", ["none", "mean"])
@pytest.mark.parametrize(("per_prompt", "weight"), [(1, 0.0), (2, 0.0), (2, 0.7), (3, -0.4), (9, 1.0)])
def test_best_against_worst(per_prompt, weight, length, levels):
    config = configured(
        {
            "pairs.kind": "best_worst",
            "pairs.per_prompt": per_prompt,
            "pairs.likelihood_weight": weight,
            "rewards.likelihood_length": length,
        }
    )
    for seed in range(20):
        rng = np.random.default_rng(seed)
        groups = groups_of(rng, (4, 1, 2, 0, 6, 3))
        candidates = PAIRING["best_worst"].candidates(groups, rng, config)
        scores = scores_of(rng, 16, candidates, levels=levels if weight == 0 else None)
        found = best_worst(groups, candidates, scores, config)
        assert [{pair.a, pair.b} for pair in found] == slow_best_worst(groups, candidates, scores, config)
        # They are candidates as they were scored, first and second answer in the same order.
        assert set(found) <= set(candidates)


def test_best_against_worst_by_hand():
    """Answer 2 beats all, 0 loses to all, 1 loses to 2 only: the likelihood can turn that round."""
    candidates = [Choice(0, 1), Choice(2, 0), Choice(2, 1)]
    logps = {"start": np.array([-1.0, -2.0, -9.0])}
    scores = Scores(logps, np.array([1, 1, 9]), np.array([1, 1, 9]), np.array([0.1, 0.9, 0.8]), False)
    for settings, expected in (
        ({}, [(2, 0), (2, 1)]),
        ({"pairs.per_prompt": 1}, [(2, 0)]),
        ({"pairs.likelihood_weight": 10.0}, [(2, 0), (0, 1)]),  # 0 is the likeliest, 2 the least
        # Per token 0 and 2 are alike, and 2 wins more often.
        ({"pairs.likelihood_weight": 10.0, "rewards.likelihood_length": "mean"}, [(2, 1), (2, 0)]),
    ):
        found = best_worst([[0, 1, 2]], candidates, scores, configured({"pairs.kind": "best_worst", **settings}))
        assert [(pair.a, pair.b) for pair in found] == expected


# --- cream -----------------------------------------------------------------------------------------------------------


def slow_cream(groups, scores):
    """[(better, worse)] by the implicit reward of M_t, and the share of answers' pairs that M_{t-1} orders alike."""
    chosen, shares = [], []
    for group in groups:
        if len(group) < 2:
            continue
        now = {i: scores.logps["start"][i] - scores.logps["implicit"][i] for i in group}
        if scores.reference_before:
            before = {i: scores.logps["before"][i] / max(scores.lengths[i], 1) for i in group}
        else:
            before = {i: scores.logps["before"][i] - scores.logps["implicit"][i] for i in group}
        alike = []
        for x, i in enumerate(group):
            for j in group[:x]:
                # Ordinal ranks: of equal rewards the one that comes later in the group ranks higher.
                ahead = [(x[i] > x[j]) or (x[i] == x[j]) for x in (now, before)]
                alike.append(float(ahead[0] == ahead[1]))
        shares.append(sum(alike) / len(alike))
        better = [i for i in group if now[i] == max(now.values())][0]
        worse = [i for i in group if now[i] == min(now.values())][0]
        if better != worse:
            chosen.append((better, worse))
    return chosen, sum(shares) / len(shares) if shares else 0.5


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("reference_before", [False, True])
def test_cream_pairs(reference_before, levels):
    config = configured({"pairs.kind": "cream", "preference.labels": "cream"})
    for seed in range(20):
        rng = np.random.default_rng(seed)
        groups = groups_of(rng, (4, 1, 2, 0, 6, 2))
        scores = scores_of(rng, 15, reference_before=reference_before, levels=levels)
        found = cream(groups, [], scores, config)
        expected, agreement = slow_cream(groups, scores)
        assert [(pair.a, pair.b) for pair in found] == expected
        assert [pair.label for pair in found] == pytest.approx([agreement] * len(expected), abs=1e-12)
    assert cream([[0], []], [], scores, config) == []


def test_rank_agreement_counts_pairs_of_answers_in_the_same_order():
    rng = np.random.default_rng(3)
    first, second = ([rng.normal(size=n) for n in (2, 5, 4, 1)] for _ in range(2))
    shares = []
    for x, y in zip(first[:3], second[:3], strict=True):
        pairs = [(i, j) for i in range(len(x)) for j in range(i)]
        shares.append(sum((x[i] > x[j]) == (y[i] > y[j]) for i, j in pairs) / len(pairs))
    assert rank_agreement(first, second) == pytest.approx(np.mean(shares), abs=1e-12)
    assert rank_agreement(first[:3], first[:3]) == 1
    assert rank_agreement(first[:3], [-x for x in first[:3]]) == 0
    assert rank_agreement([np.zeros(1)], [np.zeros(1)]) == 0.5
    assert rank_agreement([], []) == 0.5


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_prompt", [1, 2, 4])
@pytest.mark.parametrize("name", PAIRING)
def test_count_is_how_many_pairs_a_prompt_gives(name, per_prompt):
    way, config = PAIRING[name], configured({"pairs.kind": name, "pairs.per_prompt": per_prompt})
    for answers in range(1, 7):
        rng = np.random.default_rng(answers)
        groups = [list(range(answers))]
        chosen = candidates = way.candidates(groups, rng, config)
        if way.choose:
            scores = scores_of(rng, answers, candidates)
            roles = {"start", "implicit", "preference", *way.roles}  # no others are asked for
            scores = scores._replace(logps={role: scores.logps[role] for role in roles})
            chosen = way.choose(groups, candidates, scores if way.judged else scores._replace(wins=None), config)
        assert len(chosen) == way.count(answers, config)


# --- dice ------------------------------------------------------------------------------------------------------------


def slow_dice(groups, scores):
    """[(better, worse)] and alpha, grown a thousandth at a time until the chosen answers' surplus of characters grows."""
    found = []
    for step in range(1000):
        pairs = []
        for group in groups:
            value = {
                i: scores.logps["start"][i] - scores.logps["implicit"][i] - step / 1000 * scores.characters[i]
                for i in group
            }
            if len(group) > 1:
                pairs.append((max(group, key=value.get), min(group, key=value.get)))
        gap = abs(np.mean([scores.characters[a] - scores.characters[b] for a, b in pairs]))
        if found and gap > min(found)[0]:
            break
        found.append((gap, step / 1000, pairs))
    gap, alpha, pairs = min(found, key=lambda item: item[:2])
    return [pair for pair in pairs if pair[0] != pair[1]], alpha


@pytest.mark.parametrize("levels", [None, 3])
def test_dice_pairs(levels):
    config = configured({"pairs.kind": "dice", "preference.labels": "dice"})
    alphas = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        groups = groups_of(rng, (4, 1, 2, 0, 6, 3))
        scores = scores_of(rng, 16, levels=levels)
        # Longer answers have the higher rewards, so that the penalty has something to do.
        scores.logps["start"] += 0.3 * scores.characters
        expected, alpha = slow_dice(groups, scores)
        found = dice(groups, [], scores, config)
        assert [(pair.a, pair.b) for pair in found] == expected
        assert all(pair.label == 1 for pair in found)
        alphas.append(alpha)
    assert 0 < np.median(alphas) < 0.9
    assert dice([[0], []], [], scores, config) == []


def test_dice_by_hand():
    """The longest answer has the highest reward, by half a nat; a twentieth per character makes up for it."""
    logps = {"start": np.array([1.0, 0.5, 0.0]), "implicit": np.zeros(3)}
    config = configured({"pairs.kind": "dice", "preference.labels": "dice"})

    def of(characters):
        scores = Scores(logps, np.ones(3, int), np.array(characters), None, False)
        return dice([[0, 1, 2]], [], scores, config)

    assert of([20, 10, 10]) == [Choice(1, 2, 1.0)]  # from alpha .05 on both are of ten characters
    assert of([10, 10, 10]) == [Choice(0, 2, 1.0)]
    assert of([5, 10, 20]) == [Choice(0, 2, 1.0)]  # a penalty would only widen the gap


def test_of_equal_rewards_the_earlier_ranks_lower():
    for values, expected in (([3.0, 1.0, 2.0], [2, 0, 1]), ([1.0, 1.0, 0.0], [1, 2, 0]), ([5.0] * 4, [0, 1, 2, 3])):
        np.testing.assert_array_equal(ordinal(np.array(values)), expected)
