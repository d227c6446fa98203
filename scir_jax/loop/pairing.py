"""The pairing stage: from responses to pairs with their cached reference log-probabilities and frozen scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from scir_jax.config import Config
from scir_jax.data import records
from scir_jax.data.encode import Prompt, Response
from scir_jax.data.files import read_rows
from scir_jax.data.messages import answer_text, prompt_messages, prompt_text
from scir_jax.data.tally import Tally
from scir_jax.engine import hosts
from scir_jax.errors import InputError
from scir_jax.loop import console, scoring
from scir_jax.loop.models import Models
from scir_jax.loop.session import Session
from scir_jax.method import objective, rewards
from scir_jax.text.chat import Ids


@dataclass
class Answer:
    """One response of the pool. `logps`: name of a model role -> log pi(y|x)."""

    prompt: Prompt
    response: Response
    text: str
    logps: dict[str, float]


@dataclass
class PairRecord:
    """A row of pairs.jsonl; a and b are places in the pool of answers."""

    a: int
    b: int
    label: float | None = None
    frozen_logits: list[float] | None = None


def read_answers(session: Session, path: Path) -> list[Answer]:
    """Responses of an iteration's file, our own or another engine's (then `prompt` and `response` are enough)."""
    answers = []
    prompts: dict[str, Prompt | None] = {}
    tally = Tally(str(path))
    for where, row in read_rows(path):
        given = row.get("messages", records.need(row, "prompt", where))
        name = str(given)
        if name not in prompts:
            with tally.row(where):
                prompts[name] = session.encoder.prompt(prompt_messages(given, f"{where}: prompt"), where)
        prompt = prompts[name]
        if prompt is None:
            continue
        text = records.need(row, "response", where)
        if "response_ids" in row:
            response = session.encoder.sampled(_ids(session, row["response_ids"], where))
        else:
            response = session.encoder.response(answer_text(text, f"{where}: response"))
        answers.append(Answer(prompt, response, text, {}))
    return answers


def given_answers(session: Session, iteration: int) -> tuple[list[Answer], list[PairRecord]]:
    """The iteration's even share of the pairs in data.pairs, in the file's order."""
    given, iterations = session.data.given_pairs, session.config.run.iterations
    first, last = (len(given) * t // iterations for t in (iteration - 1, iteration))
    answers, pairs = [], []
    for comparison, prompt, a, b in given[first:last]:
        answers += [Answer(prompt, a, comparison.a, {}), Answer(prompt, b, comparison.b, {})]
        pairs.append(PairRecord(len(answers) - 2, len(answers) - 1, comparison.label))
    return answers, pairs


def candidates(answers: Sequence[Answer], config: Config, iteration: int) -> list[PairRecord]:
    """Pairs of different responses to the same prompt: all of them, or a seeded choice of per_prompt.

    Which response comes first is random too, so that no order of sampling leaks into the labels.
    """
    by_prompt: dict[tuple, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        by_prompt[answer.prompt.conversation].append(i)
    rng = np.random.default_rng(np.random.SeedSequence([config.run.seed, 1, iteration]))
    pairs = []
    for places in by_prompt.values():
        unique = list({answers[i].response.ids: i for i in reversed(places)}.values())[::-1]
        possible = list(combinations(unique, 2))
        if config.pairs.kind == "random" and len(possible) > config.pairs.per_prompt:
            chosen = rng.choice(len(possible), config.pairs.per_prompt, replace=False)
            possible = [possible[i] for i in sorted(chosen)]
        for a, b in possible:
            pairs.append(PairRecord(*((b, a) if rng.random() < 0.5 else (a, b))))
    return pairs


def best_worst(
    pairs: Sequence[PairRecord], answers: Sequence[Answer], generative: np.ndarray, config: Config
) -> list[int]:
    """Places in `pairs` of each prompt's best response against its worst and second-worst.

    A response's rank: its mean win probability over all its pairs, plus pairs.likelihood_weight times its
    log-likelihood (summed, or per token as rewards.likelihood_length says) standardised within the prompt.

    Args:
      generative: [len(pairs)] probability that a is better.
    """
    wins: dict[int, list[float]] = defaultdict(list)
    groups: dict[tuple, set[int]] = defaultdict(set)
    place = {}
    for number, (pair, p) in enumerate(zip(pairs, generative, strict=True)):
        wins[pair.a].append(p)
        wins[pair.b].append(1 - p)
        groups[answers[pair.a].prompt.conversation] |= {pair.a, pair.b}
        place[frozenset((pair.a, pair.b))] = number
    kept = []
    for members in groups.values():
        members = sorted(members)
        score = np.array([np.mean(wins[i]) for i in members])
        likelihood = np.array([_likelihood(answers[i], config) for i in members])
        spread = likelihood.std()
        if spread > 0:
            score = score + config.pairs.likelihood_weight * (likelihood - likelihood.mean()) / spread
        ranked = [members[i] for i in np.argsort(-score, kind="stable")]
        for worst in ranked[: -config.pairs.per_prompt - 1 : -1]:
            if worst != ranked[0]:
                kept.append(place[frozenset((ranked[0], worst))])
    return kept


def run_pairing(
    session: Session, models: Models, iteration: int, responses: Path | None, path: Path, stopper: console.Stopper
) -> None:
    """pairs.jsonl: pairs, reference log-probabilities of both responses, and scores frozen at the start.

    Each model that is needed is loaded once, M_t last, so that only one copy of the weights is there at a time.
    """
    config = session.config
    if responses is None:
        answers, pairs = given_answers(session, iteration)
    else:
        answers = read_answers(session, responses)
        pairs = candidates(answers, config, iteration)
    cream = config.preference.labels == "cream"
    if not pairs:
        raise InputError(
            f"iteration {iteration}: no prompt has two different responses; "
            "raise sample.temperature or sample.responses"
        )
    roles = {
        "implicit": models.implicit_reference(iteration),
        "preference": models.preference_reference(iteration),
        "start": iteration,
    }
    if cream:
        roles["before"] = max(iteration - 1, 0)
    numbers = sorted(set(roles.values()))  # M_t is the largest
    items = [(answer.prompt, answer.response) for answer in answers]
    frozen = needs_frozen(config)
    title = f"iteration {iteration}: references"
    total = len(numbers) * scoring.batches_of(len(items), 2 * config.evaluate.batch_size)
    total += scoring.batches_of(len(pairs), config.evaluate.batch_size) * frozen
    with console.stage(title, total) as bar:

        def advance() -> None:
            bar.advance()
            stopper.check(title)

        for number in numbers:
            logps = scoring.response_logps(session, models.load(number), items, advance)
            for role in (r for r, n in roles.items() if n == number):
                for answer, logp in zip(answers, logps, strict=True):
                    answer.logps[role] = float(logp)
        if np.allclose(*([answer.logps[role] for answer in answers] for role in ("start", "implicit")), atol=1e-6):
            console.say(
                f"note: the implicit reward's reference equals M{iteration}: it is 1/2 for every pair at first; "
                "implicit.reference names a model that lags"
            )
        if frozen:
            triples = [(answers[p.a].prompt, answers[p.a].response, answers[p.b].response) for p in pairs]
            judged = scoring.judge_pairs(session, models.load(iteration), triples, advance)
            generative = _freeze(session, answers, pairs, judged, length_penalty(config, answers, pairs))
            if config.pairs.kind == "best_worst":
                pairs = [pairs[i] for i in best_worst(pairs, answers, generative, config)]
    if cream:
        pairs = cream_pairs(answers, first_iteration=roles["before"] == roles["implicit"])
    alpha = length_penalty(config, answers, pairs)
    if hosts.first():
        records.write_rows(path, (_row(i, pair, answers, alpha) for i, pair in enumerate(pairs)))


def cream_pairs(answers: Sequence[Answer], *, first_iteration: bool) -> list[PairRecord]:
    """CREAM's pairs (arXiv 2410.12735): a prompt's best against its worst response by the implicit reward of M_t.

    The label of every pair is C, the agreement of the rankings by M_t and by M_{t-1}.

    Args:
      first_iteration: M_{t-1} is the reference itself; it ranks by its log-likelihood per token instead.
    """
    groups: dict[tuple, dict[Ids, int]] = defaultdict(dict)
    for i, answer in enumerate(answers):
        groups[answer.prompt.conversation].setdefault(answer.response.ids, i)
    now, before, pairs = [], [], []
    for members in (list(group.values()) for group in groups.values() if len(group) > 1):
        logps = {role: np.array([answers[i].logps[role] for i in members]) for role in ("start", "before", "implicit")}
        lengths = np.array([max(len(answers[i].response.ids), 1) for i in members])
        now.append(logps["start"] - logps["implicit"])
        before.append(logps["before"] / lengths if first_iteration else logps["before"] - logps["implicit"])
        pairs.append(PairRecord(members[int(now[-1].argmax())], members[int(now[-1].argmin())]))
    agreement = rewards.rank_agreement(now, before)
    return [PairRecord(pair.a, pair.b, agreement) for pair in pairs if pair.a != pair.b]


def needs_frozen(config: Config) -> bool:
    """Whether the judge must score the pairs before training."""
    return (
        config.preference.update == "frozen"
        or config.preference.labels == "consensus"
        or config.consistency.target == "consensus"
        or config.pairs.kind == "best_worst"
    )


def length_penalty(config: Config, answers: Sequence[Answer], pairs: Sequence[PairRecord]) -> float:
    """alpha of the implicit reward, fitted to the start policy's rewards of this iteration's pairs."""
    if config.implicit.length != "penalty":
        return 0.0
    reward = np.array(
        [
            [config.implicit.beta * (answers[i].logps["start"] - answers[i].logps["implicit"]) for i in (p.a, p.b)]
            for p in pairs
        ]
    )
    lengths = np.array([[len(answers[i].response.ids) for i in (p.a, p.b)] for p in pairs])
    return rewards.fit_length_penalty(reward, lengths)


def _freeze(session: Session, answers, pairs, judged, alpha: float) -> np.ndarray:
    """Stores every reward model's logit of each pair; returns the generative probability [P]."""

    def both(values) -> jnp.ndarray:
        return jnp.asarray([[values(answers[p.a]), values(answers[p.b])] for p in pairs], jnp.float32)

    lengths = both(lambda x: len(x.response.ids))
    start = both(lambda x: x.logps["start"])
    none = jnp.zeros(len(pairs), jnp.float32)
    inputs = objective.Pairs(
        logps=start,
        verdicts=jnp.asarray(judged.verdicts),
        verdict_mass=jnp.asarray(judged.mass),
        lengths=lengths,
        preference_logps=start,
        implicit_logps=both(lambda x: x.logps["implicit"]),
        start_logps=start,
        length_penalty=alpha * lengths,
        frozen_logits=none,
        external=none,
        weight=none,
    )
    logits, kinds = objective.reward_logits(inputs, session.config)
    for pair, row in zip(pairs, np.asarray(logits), strict=True):
        pair.frozen_logits = row.tolist()
    return 1 / (1 + np.exp(-np.asarray(kinds["generative"], np.float64)))


def _row(number: int, pair: PairRecord, answers: Sequence[Answer], alpha: float) -> dict[str, Any]:
    a, b = answers[pair.a], answers[pair.b]
    row: dict[str, Any] = {
        "pair": number,
        "prompt": prompt_text(a.prompt.messages),
        "messages": a.prompt.messages,
        "response_a": a.text,
        "response_b": b.text,
        "response_a_ids": list(a.response.ids),
        "response_b_ids": list(b.response.ids),
        "length_a": len(a.response.ids),
        "length_b": len(b.response.ids),
        **{f"{role}_logps": [a.logps[role], b.logps[role]] for role in ("start", "preference", "implicit")},
        "length_penalty": alpha,
    }
    if pair.frozen_logits is not None:
        row["frozen_logits"] = pair.frozen_logits
    if pair.label is not None:
        row["label"] = pair.label
    return row


def _likelihood(answer: Answer, config: Config) -> float:
    tokens = len(answer.response.ids) if config.rewards.likelihood_length == "mean" else 1
    return answer.logps["start"] / max(tokens, 1)


def _ids(session: Session, value: Any, where: str) -> list[int]:
    vocab, limit = session.arch.vocab_size, session.config.text.max_response_tokens
    if not isinstance(value, list) or not all(isinstance(i, int) and 0 <= i < vocab for i in value):
        raise InputError(f"{where}: response_ids must be token ids from 0 to {vocab - 1}")
    return value[:limit]
