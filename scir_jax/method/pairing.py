"""Pairing: which answers of a prompt are compared, on the host, before training.

A way has two parts. `candidates` names pairs that may be taken; they are scored. `choose` then takes pairs by the
scores. Answers are places in a list; a group is the places of one prompt's different answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from scir_jax.config.schema import Config

Group = Sequence[int]


class Choice(NamedTuple):
    """A pair of answers by place; `label` is the probability that `a` is better where the way itself says so."""

    a: int
    b: int
    label: float | None = None


class Scores(NamedTuple):
    """What is known of all answers and candidates.

    Attributes:
      logps: role -> [answers] log pi(y|x), nats, float64.
      lengths: [answers] tokens.
      characters: [answers] of their texts.
      wins: [candidates] the judge's probability that `a` is better; None where it was not asked.
      reference_before: the model of the iteration before is the implicit reward's reference itself.
      rewards: [answers] those of pairs.scorer, or the judge's points where they label, float64; None without either.
    """

    logps: dict[str, np.ndarray]
    lengths: np.ndarray
    characters: np.ndarray
    wins: np.ndarray | None
    reference_before: bool
    rewards: np.ndarray | None = None


class Way(NamedTuple):
    """An entry of PAIRING.

    Attributes:
      candidates: (groups, generator, config) -> pairs to score.
      choose: (groups, candidates, scores, config) -> pairs to train on; None: all candidates.
      judged: `choose` needs the judge's verdict on every candidate, or an external reward of every answer.
      roles: models whose log-probabilities `choose` needs beside the usual ones.
      count: (answers of a prompt, config) -> pairs that are taken, at the most.
    """

    candidates: Callable[[Sequence[Group], np.random.Generator, Config], list[Choice]]
    count: Callable[[int, Config], int]
    choose: Callable[[Sequence[Group], Sequence[Choice], Scores, Config], list[Choice]] | None = None
    judged: bool = False
    roles: tuple[str, ...] = ()


def all_pairs(groups: Sequence[Group], rng: np.random.Generator, config: Config, most: int | None = None):
    """Returns all pairs of each group, or a random choice of them.

    Which answer comes first is random too, so that no order of sampling leaks into the labels.

    Args:
      most: pairs to choose from each group; None: all.
    """
    pairs = []
    for group in groups:
        possible = list(combinations(group, 2))
        if most is not None and len(possible) > most:
            chosen = rng.choice(len(possible), most, replace=False)
            possible = [possible[i] for i in sorted(chosen)]
        pairs += [Choice(*((b, a) if rng.random() < 0.5 else (a, b))) for a, b in possible]
    return pairs


def random_pairs(groups: Sequence[Group], rng: np.random.Generator, config: Config) -> list[Choice]:
    """Returns a random choice of pairs.per_prompt pairs of each group."""
    return all_pairs(groups, rng, config, config.pairs.per_prompt)


def best_worst(groups: Sequence[Group], candidates: Sequence[Choice], scores: Scores, config: Config) -> list[Choice]:
    """Takes each prompt's best answer against its worst, its second-worst and so on, pairs.per_prompt in number.

    An answer's rank: its mean win probability over all its pairs, or its reward where there is one, plus
    pairs.likelihood_weight times its log-likelihood (summed, or per token as rewards.likelihood_length says)
    standardised within the prompt.
    """
    wins: dict[int, list[float]] = defaultdict(list)
    for pair, p in zip(candidates, scores.wins, strict=True) if scores.rewards is None else ():
        wins[pair.a].append(p)
        wins[pair.b].append(1 - p)
    place = {frozenset((pair.a, pair.b)): pair for pair in candidates}
    per_token = config.rewards.likelihood_length == "mean"
    kept = []
    for members in (sorted(group) for group in groups if len(group) > 1):
        score = np.array([np.mean(wins[i]) for i in members]) if scores.rewards is None else scores.rewards[members]
        likelihood = scores.logps["start"][members] / (np.maximum(scores.lengths[members], 1) if per_token else 1)
        spread = likelihood.std()
        if spread > 0:
            score = score + config.pairs.likelihood_weight * (likelihood - likelihood.mean()) / spread
        ranked = [members[i] for i in np.argsort(-score, kind="stable")]
        for worst in ranked[: -config.pairs.per_prompt - 1 : -1]:
            if worst != ranked[0]:
                kept.append(place[frozenset((ranked[0], worst))])
    return kept


def cream(groups: Sequence[Group], candidates: Sequence[Choice], scores: Scores, config: Config) -> list[Choice]:
    """Takes a prompt's best against its worst answer by the implicit reward of M_t.

    The label of every pair is C, the agreement of the rankings by M_t and by M_{t-1}. Where M_{t-1} is the reference
    itself it ranks by its log-likelihood per token instead. Of equal rewards the earlier answer's ranks lower, in both
    rankings (ordinal ranks). Source: CREAM, arXiv 2410.12735, section 4, and its code.
    """
    now, before, pairs = [], [], []
    for members in (list(group) for group in groups if len(group) > 1):
        logps = {role: scores.logps[role][members] for role in ("start", "before", "implicit")}
        lengths = np.maximum(scores.lengths[members], 1)
        now.append(logps["start"] - logps["implicit"])
        before.append(logps["before"] / lengths if scores.reference_before else logps["before"] - logps["implicit"])
        pairs.append((members[int(now[-1].argmax())], members[int(now[-1].argmin())]))
    agreement = rank_agreement([ordinal(x) for x in now], [ordinal(x) for x in before])
    return [Choice(a, b, agreement) for a, b in pairs if a != b]


def ordinal(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each value from the smallest on, 0 to N - 1; of equal values the earlier one ranks lower."""
    ranks = np.empty(len(values), int)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def dice(groups: Sequence[Group], candidates: Sequence[Choice], scores: Scores, config: Config) -> list[Choice]:
    """Takes a prompt's best against its worst answer by log pi_t - log pi_ref - alpha |y|, |y| in characters.

    alpha is 0, 0.001, ... up to 1: it grows until the mean difference of the chosen and the rejected answers' lengths
    shrinks no more. Source: DICE, arXiv 2406.09760, section 4, and its code.
    """
    members = [list(group) for group in groups if len(group) > 1]
    if not members:
        return []
    places = np.full((len(members), max(map(len, members))), -1)
    for row, group in enumerate(members):
        places[row, : len(group)] = group
    there, at = places >= 0, np.arange(len(members))
    rewards = (scores.logps["start"] - scores.logps["implicit"])[places]
    lengths = scores.characters[places]

    def extremes(alpha: float) -> tuple[np.ndarray, np.ndarray]:
        values = rewards - alpha * lengths
        return np.where(there, values, -np.inf).argmax(axis=1), np.where(there, values, np.inf).argmin(axis=1)

    smallest, chosen = np.inf, extremes(0.0)
    for alpha in np.arange(1000) / 1000:
        best, worst = extremes(alpha)
        gap = abs((lengths[at, best] - lengths[at, worst]).mean())
        if gap > smallest:
            break
        if gap < smallest:
            smallest, chosen = gap, (best, worst)
    pairs = zip(places[at, chosen[0]].tolist(), places[at, chosen[1]].tolist())
    return [Choice(a, b, 1.0) for a, b in pairs if a != b]


def rank_agreement(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Computes C = mean over prompts of (tau + 1) / 2, tau Kendall's correlation of two rewards of a prompt's answers.

    1 where two models rank all answers alike, 1/2 by chance. Source: CREAM, arXiv 2410.12735, section 4.

    Args:
      first, second: for each prompt [N] rewards; prompts with fewer than two answers say nothing.
    """
    agreement = []
    for x, y in zip(first, second, strict=True):
        i, j = np.triu_indices(len(x), 1)
        if len(i):
            agreement.append((np.mean(np.sign((x[i] - x[j]) * (y[i] - y[j]))) + 1) / 2)
    return float(np.mean(agreement)) if agreement else 0.5


def _every(answers: int) -> int:
    return answers * (answers - 1) // 2


PAIRING = {
    "random": Way(random_pairs, lambda n, config: min(config.pairs.per_prompt, _every(n))),
    "all": Way(all_pairs, lambda n, config: _every(n)),
    "best_worst": Way(all_pairs, lambda n, config: min(config.pairs.per_prompt, n - 1), best_worst, judged=True),
    "dice": Way(lambda groups, rng, config: [], lambda n, config: min(n - 1, 1), dice),
    "cream": Way(lambda groups, rng, config: [], lambda n, config: min(n - 1, 1), cream, roles=("before",)),
}
"""The ways of choosing pairs by name."""
