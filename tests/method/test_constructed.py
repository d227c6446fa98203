"""Pairs of known order: what they are made of."""

from collections import Counter

import numpy as np
import pytest

from scir_jax.method.constructed import Construction, alike, construct

GROUPS = [[0, 1, 2], [3], [], [4, 5], [6, 7]]
PROMPTS = [{1, 2, 3}, {1, 2, 9}, set(), {7, 8}, {7, 8, 3}]
OF = {place: number for number, group in enumerate(GROUPS) for place in group}


def test_by_hand():
    assert alike({1, 2, 3}, {1, 2, 9}) == 0.5 and alike(set(), set()) == 0 and alike({4}, {4}) == 1
    found = construct(GROUPS, PROMPTS, ("similar", "cut"), np.random.default_rng(0))
    assert [pair.kind for pair in found] == ["similar", "cut"] * 4
    assert [OF[pair.better] for pair in found] == [0, 0, 1, 1, 3, 3, 4, 4]
    # The first two prompts share two of four tokens, the last two two of three.
    assert [OF[pair.worse] for pair in found[::2]] == [1, 0, 4, 3]
    assert all(pair.worse is None for pair in found[1::2])


def test_other_prompts_and_answers_are_as_likely():
    rng, draws = np.random.default_rng(1), 4000
    counts = Counter(construct(GROUPS, PROMPTS, ("other",), rng)[0][1:] for _ in range(draws))
    assert {OF[better] for better, _ in counts} == {0} and {OF[worse] for _, worse in counts} == {1, 3, 4}
    # Any of three answers against one of three prompts, and against each of its answers alike.
    for (_, worse), count in counts.items():
        p = 1 / 9 / len(GROUPS[OF[worse]])
        assert abs(count / draws - p) < 5 * np.sqrt(p * (1 - p) / draws)
    assert len(counts) == 3 * 5


def test_the_seed_decides_and_one_prompt_has_no_other():
    again = [construct(GROUPS, PROMPTS, ("other", "cut"), np.random.default_rng(2)) for _ in range(2)]
    assert again[0] == again[1] != construct(GROUPS, PROMPTS, ("other", "cut"), np.random.default_rng(3))
    rng = np.random.default_rng(4)
    assert construct([[0]], [{1}], ("other", "similar"), rng) == []
    assert construct([[0]], [{1}], ("similar", "cut"), rng) == [Construction("cut", 0, None)]


@pytest.mark.parametrize("prompts", [2, 70, 300])
def test_the_most_alike_of_many(prompts):
    """Up to 65 prompts all others are looked at; of more a part."""
    groups, rng = [[i] for i in range(prompts)], np.random.default_rng(5)
    tokens = [{*rng.integers(0, 40, 6).tolist()} for _ in groups]
    found = construct(groups, tokens, ("similar",), rng)
    assert len(found) == prompts and all(pair.worse != pair.better for pair in found)
    near = np.mean([alike(tokens[pair.better], tokens[pair.worse]) for pair in found])
    mean = np.mean([alike(tokens[i], tokens[j]) for i in range(prompts) for j in range(i)])
    assert near > 2 * mean if prompts > 2 else near == mean
