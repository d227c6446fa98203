"""Pairs that are drawn before training: by the judge's certainty, and from labelled ones."""

from collections import Counter

import numpy as np
import pytest

from scir_jax.data.pairs import Answer, Pair, Prompt
from scir_jax.run.models import judge_before
from scir_jax.run.pairing import drawn, offline_pairs
from tests.method_reference import changed, configured

UPO = configured({"selection.rule": "sampled", "preference.labels": "generative", "preference.update": "frozen"})


def pair(number, **known):
    prompt, answer = Prompt([], (number,), ()), Answer("", (1,), ())
    return Pair(prompt, answer, answer, **known)


def test_a_pair_weighs_as_often_as_it_was_drawn():
    """The label is the side of the mean of the frozen logits; three of four pairs are not contradicted."""
    said = [([2.0, -1.0], [2, 2, -2]), ([-3.0, 1.0], [-2, -2, 2]), ([1.0, 1.0], [-1, -1, 1]), ([4.0, 4.0], [9, 9, 9])]
    pairs = [pair(i, frozen={"generative": g}, verdicts=tuple(v)) for i, (g, v) in enumerate(said)]
    totals = Counter()
    for seed in range(300):
        found = drawn(UPO, pairs, np.random.default_rng(seed))
        assert sum(one.weight for one in found) == 3 and all(one.weight in (1, 2, 3) for one in found)
        totals.update({one.prompt.ids[0]: one.weight for one in found})
    # B of the first two is the same, 0.4 bits, and that of the last 0.
    assert set(totals) == {0, 1, 3} and totals[3] > max(totals[0], totals[1])
    assert abs(totals[0] - totals[1]) < 5 * np.sqrt(2 * 300)
    assert drawn(UPO, [pairs[2]], np.random.default_rng(0)) == []
    # Labels that the pairs bring with them count as well.
    external = changed(UPO, {"preference.labels": "external"})
    labelled = [pair(0, label=1.0, verdicts=(1.0,)), pair(1, label=0.0, verdicts=(1.0,)), pair(2, verdicts=(1.0,))]
    assert [one.prompt.ids for one in drawn(external, labelled, np.random.default_rng(0))] == [(0,)]


@pytest.mark.parametrize(("share", "expected"), [(0.5, 3), (0.25, 1), (0.75, 9)])
def test_labelled_pairs_are_drawn_of_other_prompts(share, expected):
    config = configured({"pairs.offline": share})
    items = [(Prompt([], (number,), ()), Answer("", (1,), ())) for number in (0, 0, 1, 1, 2, 2, 3)]
    groups = [[0, 1], [2, 3], [4, 5], [6]]
    offline = [pair(number, label=1.0) for number in range(20)]
    found = offline_pairs(config, items, groups, offline, np.random.default_rng(0))
    assert len(found) == len({one.prompt.ids for one in found}) == expected
    assert all(one.prompt.ids[0] > 3 for one in found)
    assert found != offline_pairs(config, items, groups, offline, np.random.default_rng(1)) or expected == 1
    # There may be fewer.
    assert len(offline_pairs(config, items, groups, offline[:6], np.random.default_rng(0))) == min(expected, 2)


def test_the_judge_before():
    """M0 has not learned to judge, unless it is a later model of another run."""
    config = configured({})
    assert [judge_before(config, t) for t in (1, 2, 3)] == [1, 1, 2]
    for start, expected in (("runs/a", 1), ("runs/a:M1", 1), ("runs/a:M3", 0)):
        assert judge_before(changed(config, {"run.start_from": start}), 1) == expected
