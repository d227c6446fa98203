"""The stage that makes pairs: which answers are compared, their reference log-probabilities and frozen scores."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.jsonl import write_rows
from scir_jax.data.pairs import Pair, to_row
from scir_jax.engine.hosts import hosts
from scir_jax.engine.programs import Programs
from scir_jax.engine.sampler import stream_key
from scir_jax.errors import InputError
from scir_jax.method import labels, objective, rewards, selection
from scir_jax.method.labels import LABELS
from scir_jax.method.pairing import PAIRING, Choice, Scores
from scir_jax.method.selection import SELECTION
from scir_jax.method.targets import transitive
from scir_jax.run import answers, console, scorer, scoring
from scir_jax.run.answers import Source
from scir_jax.run.costs import Account, Spend
from scir_jax.run.inputs import Inputs
from scir_jax.run.models import Models, judge_before, roles
from scir_jax.run.scorer import Scorer
from scir_jax.run.scoring import Item


def given_pairs(inputs: Inputs, shares: int, iteration: int) -> Source:
    """Returns the iteration's even share of the pairs in data.pairs, in the file's order; after the end it starts anew.

    Args:
      shares: into how many parts the pairs are divided.
    """
    pairs, part = inputs.given_pairs, (iteration - 1) % shares
    mine = pairs[len(pairs) * part // shares : len(pairs) * (part + 1) // shares]
    items = [(pair.prompt, answer) for pair in mine for answer in pair.answers]
    return Source(items, [Choice(2 * i, 2 * i + 1, pair.label) for i, pair in enumerate(mine)])


def different(items: Sequence[Item]) -> list[list[int]]:
    """Groups the places of each prompt's different answers."""
    by_prompt: dict[tuple, list[int]] = defaultdict(list)
    for i, (prompt, _) in enumerate(items):
        by_prompt[prompt.ids].append(i)
    return [list({items[i][1].ids: i for i in reversed(places)}.values())[::-1] for places in by_prompt.values()]


def offline_pairs(
    config: Config, items: Sequence[Item], groups: Sequence[Sequence[int]], offline: Sequence[Pair], rng
) -> list[Pair]:
    """Draws labelled pairs of other prompts than the iteration's, as many as pairs.offline can ask for."""
    prompts = {prompt.ids for prompt, _ in items}
    others = [pair for pair in offline if pair.prompt.ids not in prompts]
    count = _share(sum(len(group) > 1 for group in groups), config.pairs.offline)
    if count > len(others):
        console.say(f"note: data.eft has {len(others)} pairs of other prompts, pairs.offline asks for {count}")
    return [others[i] for i in rng.permutation(len(others))[:count]]


def _share(pairs: int, share: float) -> int:
    """Returns how many further pairs make up a share of all."""
    return int(share * pairs / (1 - share))


def drawn(config: Config, pairs: Sequence[Pair], rng: np.random.Generator) -> list[Pair]:
    """Returns the pairs that selection.rule sampled draws; each one's weight is how often it was drawn."""
    label = LABELS[config.preference.labels]
    if label.logit is None:
        q = np.array([0.5 if pair.label is None else pair.label for pair in pairs])
    else:
        frozen = {name: np.array([p.frozen[name] for p in pairs], np.float32) for name in label.rewards(config)}
        q = np.asarray(labels.probability(label.logit(frozen, config), soft=False), np.float64)
    verdicts = np.array([pair.verdicts for pair in pairs], np.float64)
    counts = selection.draw(verdicts, q, config.selection.power, rng)
    return [dataclasses.replace(pair, weight=float(n)) for pair, n in zip(pairs, counts) if n]


class Scored(NamedTuple):
    """What is known of candidates.

    Attributes:
      candidates: pairs of places in the items.
      by_role: role -> reading -> [items] float32, NaN for items that nobody looks at.
      verdicts: [candidates, S] the judge's single verdicts under M_t, where the method looks at them.
      frozen: reward model -> [candidates, C] logits under M_t; and those of rewards.JUDGED that the method takes.
      rewards: [items] those of pairs.scorer, float64, NaN for items that nobody looks at; None without one.
    """

    candidates: list[Choice]
    by_role: dict[str, dict[str, np.ndarray]]
    verdicts: np.ndarray | None
    frozen: dict[str, np.ndarray]
    rewards: np.ndarray | None = None


def make_pairs(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    models: Models,
    iteration: int,
    source: Source,
    path: Path,
    stopper: console.Stopper,
    account: Account,
    external: Scorer | None = None,
    offline: Sequence[Pair] = (),
) -> None:
    """Writes pairs.jsonl: pairs, reference log-probabilities of both answers, and scores frozen at the start.

    Args:
      account: of the stage.
      external: says which answer of a pair is better.
      offline: labelled pairs, of which pairs.offline takes its share.

    Raises:
      InputError: there is no pair.
    """
    items, way = source.items, PAIRING[config.pairs.kind]
    groups = different(items)
    rng = np.random.default_rng(np.random.SeedSequence([config.run.seed, 1, iteration]))
    if source.given is None:
        candidates = way.candidates(groups, rng, config)
    else:
        candidates = source.given
    if not candidates and all(len(group) < 2 for group in groups):
        raise InputError(
            f"iteration {iteration}: no prompt has two different responses; "
            "raise sample.temperature or sample.responses"
        )
    kept = offline_pairs(config, items, groups, offline, rng) if config.pairs.offline else []
    labelled = [Choice(len(items) + 2 * i, len(items) + 2 * i + 1, pair.label) for i, pair in enumerate(kept)]
    items = [*items, *((pair.prompt, answer) for pair in kept for answer in pair.answers)]
    scored = score_candidates(
        config, encoder, programs, models, iteration, items, candidates, stopper, external, account.add
    )
    far = answers.check_claims(source.claims, items, scored.by_role["start"]["logps"])
    if far is not None:
        console.say(
            f"log-probabilities of the engine that sampled: {far:.1g} nats per token from this model's (median)"
        )
    chosen = candidates
    if way.choose and source.given is None:
        chosen = way.choose(groups, candidates, _scores(config, items, scored, iteration), config)
        chosen += labelled[: _share(len(chosen), config.pairs.offline)]
    pairs = finished(config, items, scored, chosen)
    if SELECTION[config.selection.rule].drawn:
        pairs = drawn(config, pairs, rng)
        if not pairs:
            raise InputError(
                f"iteration {iteration}: most of the judge's verdicts contradict the label of every pair, so that "
                "selection.rule sampled leaves none; take another rule, or train the judge (sft) longer"
            )
    account.keep()
    if hosts.first():
        write_rows(path, (to_row(pair, number) for number, pair in enumerate(pairs)))


def score_candidates(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    models: Models,
    iteration: int,
    items: Sequence[Item],
    candidates: list[Choice],
    stopper: console.Stopper,
    external: Scorer | None = None,
    spend: Spend = scoring.nothing,
) -> Scored:
    """Scores the candidates' items under the models in every role, and asks the judge where it is needed.

    Each model is loaded once, M_t last, so that only one copy of the weights is there at a time.

    Args:
      spend: is told what that cost.
    """
    wanted, numbers = objective.needs(config), roles(config, iteration)
    asked = sorted({"start", "implicit", "preference", *PAIRING[config.pairs.kind].roles})
    earlier = judge_before(config, iteration) if "generative_before" in wanted.frozen else None
    # M_t, the largest number, comes last.
    loads = sorted({numbers[role] for role in asked}, key=lambda which: (isinstance(which, int), which))
    again = earlier is not None and earlier != iteration
    title = f"iteration {iteration}: pair and score"
    passes = programs.judge_passes if wanted.verdicts else 0
    pairs = [_pair(items, choice) for choice in candidates]
    # A way that ranks a prompt's answers looks at all of them, others at those that are in a pair.
    every = PAIRING[config.pairs.kind].choose is not None
    used = np.arange(len(items)) if every else np.unique(_places(candidates))
    total = (len(loads) + (external is not None) + wanted.pointwise) * len(used) + (
        wanted.judged + passes + again
    ) * len(pairs)
    read: dict[int | str, dict[str, np.ndarray]] = {}
    judged = verdicts = given = before = None
    rated: dict[str, np.ndarray] = {}
    with console.stage(title, total) as bar:

        def advance(by: int) -> None:
            bar.advance(by=by)
            stopper.check(title)

        if external is not None:
            models.release()
            given = _spread(external.rewards([items[i] for i in used], advance, spend), used, len(items), np.float64)
        if again:
            before = scoring.judge_pairs(encoder, programs, models.load(earlier), pairs, advance, spend=spend)
        for number in loads:
            params, mine = models.load(number), [items[i] for i in used]
            found = scoring.score_answers(encoder, programs, params, mine, advance, spend)
            read[number] = {name: _spread(values, used, len(items)) for name, values in found.items()}
        if wanted.pointwise:
            params, mine = models.load(iteration), [items[i] for i in used]
            rated = scoring.rate_answers(encoder, programs, params, mine, advance, spend)
        if wanted.judged:
            judged = scoring.judge_pairs(encoder, programs, models.load(iteration), pairs, advance, spend=spend)
        if passes:
            key = stream_key(config.run.seed, "verdicts", iteration)
            params = models.load(iteration)
            verdicts = scoring.single_verdicts(encoder, programs, params, pairs, advance, key, spend)
        elif wanted.verdicts:
            verdicts = rewards.single_verdicts(judged.verdicts)
    by_role = {role: read[numbers[role]] for role in asked}
    points = {name: _spread(values, used, len(items)) for name, values in rated.items()}
    if np.allclose(by_role["start"]["logps"], by_role["implicit"]["logps"], atol=1e-6, equal_nan=True):
        console.say(
            f"note: the implicit reward's reference equals M{iteration}: no earlier model is there, and at the first "
            "step it is 1/2 for every pair; implicit.reference takes the directory of one, such as the model before "
            "its tuning"
        )
    places = _places(candidates)
    fresh = {reading: values[places] for reading, values in by_role["start"].items()}
    by_role["start"] = by_role["start"] | points
    if judged is not None:
        fresh |= {"verdicts": judged.verdicts, "verdict_mass": judged.mass}
    cached = {f"{role}_logps": by_role[role]["logps"][places] for role in asked}
    cached |= {f"start_{name}": values[places] for name, values in points.items()}
    evidence = scoring.evidence_of(pairs, fresh, cached, config)
    logits = rewards.reward_logits(evidence, config, wanted.start)
    frozen = {name: np.asarray(values) for name, values in logits.items()}
    if earlier is not None:
        verdicts_before = (judged if before is None else before).verdicts
        frozen["generative_before"] = np.asarray(rewards.judged(verdicts_before)["logit"])
    if "transitive" in wanted.frozen:
        mean = frozen["generative"].mean(axis=1)
        frozen["transitive"] = transitive(places, mean)[:, None].astype(np.float32)
    return Scored(candidates, by_role, verdicts, frozen, given)


def finished(config: Config, items: Sequence[Item], scored: Scored, chosen: Sequence[Choice]) -> list[Pair]:
    """Returns the chosen pairs with all that training needs of them."""
    places = _places(chosen)
    start, implicit = (scored.by_role[role]["logps"][places] for role in ("start", "implicit"))
    lengths = np.array([[len(items[i][1].ids) for i in pair] for pair in places])
    alpha = scoring.length_penalty(config, start, implicit, lengths)
    number_of = {choice: i for i, choice in enumerate(scored.candidates)}
    pairs = []
    for choice in chosen:
        cached = {
            f"{role}_{reading}": (float(values[choice.a]), float(values[choice.b]))
            for role in ("start", "preference", "implicit")
            for reading, values in scored.by_role[role].items()
        }
        said = choice.label
        if scored.rewards is not None:
            cached["external_reward"] = (float(scored.rewards[choice.a]), float(scored.rewards[choice.b]))
            said = scorer.label(cached["external_reward"], soft=config.preference.soft)
        frozen, i = {}, number_of.get(choice)
        verdicts: tuple[float, ...] = ()
        if i is not None:
            frozen = {name: tuple(map(float, logits[i])) for name, logits in scored.frozen.items()}
            if scored.verdicts is not None:
                verdicts = tuple(map(float, scored.verdicts[i]))
        pair = _pair(items, choice._replace(label=said))
        pairs.append(dataclasses.replace(pair, cached=cached, frozen=frozen, verdicts=verdicts, length_penalty=alpha))
    return pairs


def _scores(config: Config, items: Sequence[Item], scored: Scored, iteration: int) -> Scores:
    """Collects what a way of choosing pairs looks at."""
    numbers = roles(config, iteration)
    wins = scored.frozen.get("generative")
    points = scored.by_role["start"].get("points") if config.preference.labels == "pointwise" else None
    return Scores(
        logps={role: values["logps"].astype(np.float64) for role, values in scored.by_role.items()},
        lengths=np.array([len(answer.ids) for _, answer in items]),
        characters=np.array([len(answer.text) for _, answer in items]),
        wins=None if wins is None else 1 / (1 + np.exp(-wins.mean(axis=1).astype(np.float64))),
        reference_before=numbers["before"] == numbers["implicit"],
        rewards=scored.rewards if points is None else points.astype(np.float64),
    )


def _pair(items: Sequence[Item], choice: Choice) -> Pair:
    return Pair(items[choice.a][0], items[choice.a][1], items[choice.b][1], choice.label)


def _spread(values: np.ndarray, places: np.ndarray, size: int, dtype: type = np.float32) -> np.ndarray:
    """Returns [size] with the values at their places, and NaN elsewhere."""
    result = np.full(size, np.nan, dtype)
    result[places] = values
    return result


def _places(choices: Sequence[Choice]) -> np.ndarray:
    return np.array([(choice.a, choice.b) for choice in choices], int).reshape(-1, 2)
