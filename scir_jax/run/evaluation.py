"""Evaluation of M1, M2, ...: the reward models on held-out labelled pairs, and held-out responses by a grader.

The grader is used here and nowhere else; training never sees it.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.files import read_rows
from scir_jax.data.jsonl import write_json, write_rows
from scir_jax.data.pairs import Answer, Pair, Prompt
from scir_jax.engine.hosts import hosts
from scir_jax.engine.programs import Programs
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.errors import InputError
from scir_jax.evaluation.reliability import reliability
from scir_jax.method import rewards
from scir_jax.method.rewards import REWARDS, Evidence
from scir_jax.run import console, costs, scoring
from scir_jax.run.costs import Account, Spend
from scir_jax.run.directory import RunDirectory
from scir_jax.run.inputs import Inputs
from scir_jax.run.metrics import Metrics
from scir_jax.run.models import Models, roles
from scir_jax.run.sampling import sample, settings_of

TABLE_ROWS = 16
"""of the tables of answers and pairs that logs show"""

Grader = Callable[[str, str], dict[str, float]]


def load_grader(name: str | None) -> Grader | None:
    """Imports the function `module:function`; None without a name.

    Raises:
      InputError: it cannot be imported.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"evaluate.grader {name!r} cannot be imported (module:function): {error}") from None


def evaluate_model(
    config: Config,
    encoder: Encoder,
    inputs: Inputs,
    programs: Programs,
    models: Models,
    directory: RunDirectory,
    metrics: Metrics,
    grader: Grader | None,
    stopper: console.Stopper,
    t: int,
    account: Account,
) -> None:
    """Writes evaluation.json of M_{t+1}, the model that iteration t ends with.

    Args:
      account: of the stage.
    """
    folder, number = directory.iteration(t), t + 1
    reference = roles(config, t)["implicit"]
    # A model that is its own reference has an implicit reward of 1/2 everywhere.
    load_reference = (lambda: models.load(reference)) if reference != number else None
    title = f"evaluation of M{number}"
    against = None
    first = directory.iteration(0) / "heldout_responses.jsonl"
    if t and first.exists():  # the file of held-out prompts may have been added later
        against = [row for _, row in read_rows(first)]
    values, rows = evaluate(
        config,
        encoder,
        inputs,
        programs,
        model=lambda: models.load(number),
        reference=load_reference,
        grader=grader,
        against=against,
        first=(lambda: models.load(1)) if t and config.evaluate.divergence else None,
        title=f"evaluate M{number}",
        check=lambda: stopper.check(title),
        spend=account.add,
    )
    if rows and hosts.first():
        write_rows(folder / "heldout_responses.jsonl", rows)
    if t:
        values |= decision_metrics(folder, grader)
    values = clean({"model": f"M{number}", **values})
    metrics.evaluation(values)
    account.keep()
    if hosts.first():
        metrics.tables(tables_of(number, rows, folder if t else None))
        write_json(folder / "evaluation.json", values)
    hosts.barrier(f"evaluated M{number}")


def evaluate(
    config: Config,
    encoder: Encoder,
    inputs: Inputs,
    programs: Programs,
    *,
    model: Callable[[], Any],
    reference: Callable[[], Any] | None,
    grader: Grader | None,
    against: Sequence[dict] | None = None,
    first: Callable[[], Any] | None = None,
    title: str,
    check: Callable[[], None] = scoring.nothing,
    spend: Spend = scoring.nothing,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluates a model on the held-out pairs and prompts.

    Args:
      model, reference: give parameters when called; without a reference there is no implicit reward.
      against: M1's responses to the held-out prompts, for the win rate.
      first: gives M1's parameters when called, for the divergence from it.
      title: of the progress bar.
      check: is called where the evaluation may be stopped.
      spend: is told what that cost.

    Returns:
      The metrics, and one row per response.
    """
    pairs, labels = labelled_pairs(inputs.heldout_pairs)
    prompts = inputs.heldout_prompts
    rated = encoder.pointwise is not None
    total = scoring.score_count(len(pairs), with_reference=reference is not None, rated=rated)
    kinds = [(False, config.evaluate.samples, heldout_sampling(config))]
    if config.evaluate.greedy:
        kinds.append((True, 1, Sampling.of(0.0)))
    total += len(prompts) * sum(responses for _, responses, _ in kinds)
    if first is not None:
        total += len(prompts) * config.evaluate.samples
    values: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with console.stage(title, total) as bar:

        def advance(by: int) -> None:
            bar.advance(by=by)
            check()

        if pairs:
            evidence = scoring.score_pairs(
                encoder, programs, pairs, config=config, model=model, reference=reference, advance=advance, spend=spend
            )
            evidence = without_own_reference(evidence)
            values |= pair_metrics(config, evidence, labels)
        for greedy, responses, sampling in kinds:
            sampled = sample_heldout(config, encoder, programs, model, prompts, responses, sampling, advance)
            spend(costs.sampled(programs, sampled))
            rows += [{"greedy": greedy, **row} for row in sampled]
        if rows:
            values |= response_metrics(rows, grader, against)
        if rows and first is not None:
            values["kl"] = divergence(encoder, programs, first(), rows, advance, spend)
    return values, rows


def divergence(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    rows: Sequence[dict],
    advance: scoring.Advance = scoring.nothing,
    spend: Spend = scoring.nothing,
) -> float:
    """Computes the mean of log pi_t(y|x) - log pi(y|x), nats per answer: an estimate of KL(M_t || M) for another model M.

    The answers are those that M_t sampled; with another temperature than 1, top-p or top-k it is the mean over what is
    sampled so, which is no longer a divergence but still tells how far the models are apart.

    Args:
      params: M's.
      rows: M_t's answers, with its log-probabilities; greedy ones do not count.
      spend: is told what that cost.
    """
    sampled = [row for row in rows if not row["greedy"]]
    items = [
        (
            Prompt([], tuple(row["prompt_ids"]), tuple(row["prompt_quote_ids"])),
            Answer(row["response"], tuple(row["response_ids"]), tuple(row["quote_ids"])),
        )
        for row in sampled
    ]
    theirs = scoring.score_answers(encoder, programs, params, items, advance, spend)["logps"]
    return float(np.mean(np.array([row["logprob"] for row in sampled], np.float64) - theirs))


def heldout_sampling(config: Config) -> Sampling:
    """Returns how the answers to held-out prompts are sampled: as in `sample`, where `evaluate` says nothing else."""
    names = ("temperature", "top_p", "top_k")
    own = {name: value for name in names if (value := getattr(config.evaluate, name)) is not None}
    return settings_of(dataclasses.replace(config.sample, **own))


def sample_heldout(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    model: Callable[[], Any],
    prompts: Sequence[Prompt],
    responses: int,
    sampling: Sampling,
    advance: scoring.Advance,
) -> list[dict[str, Any]]:
    """Samples responses to the held-out prompts, with the same noise for every model: less chance in a comparison."""
    if not prompts:
        return []
    key, rows = stream_key(config.run.seed, "evaluation", 0), []
    numbered = list(enumerate(prompts))
    for found in sample(encoder, programs, model(), numbered, responses=responses, sampling=sampling, key=key):
        rows += found.rows
        advance(found.answers)
    return sorted(rows, key=lambda row: (row["prompt_number"], row["sample"]))


def response_metrics(rows: Sequence[dict], grader: Grader | None, against: Sequence[dict] | None) -> dict[str, float]:
    """Measures length, entropy, ends and diversity of sampled responses; with a grader quality and the win rate.

    The entropy is the mean of -log pi(token), nats: an estimate of the policy's entropy where answers
    are sampled at temperature 1.

    Args:
      against: M1's responses; the win rate is over all pairs of samples, ties count 1/2. There is none where the prompts
        are not the same, as in a run that was given other ones since.
    """
    sampled = [r for r in rows if not r["greedy"]]
    result = {
        "length": float(np.mean([len(r["response_ids"]) for r in sampled])),
        "entropy": -sum(r["logprob"] for r in sampled) / max(sum(len(r["response_ids"]) for r in sampled), 1),
        "eos_rate": float(np.mean([r["stop"] == "eos" for r in sampled])),
        "distinct": float(
            np.mean([len(set(texts)) for texts in _by_prompt(sampled, lambda r: r["response"]).values()])
        ),
    }
    if grader is None:
        return result
    grades = [grader(r["prompt"], r["response"]) for r in sampled]
    result |= {name: float(np.mean([g[name] for g in grades])) for name in grades[0]}
    if greedy := [grader(r["prompt"], r["response"]) for r in rows if r["greedy"]]:
        result |= {f"greedy_{name}": float(np.mean([g[name] for g in greedy])) for name in greedy[0]}
    if against is not None and _prompts(against) == _prompts(rows):

        def quality(r: dict) -> float:
            return grader(r["prompt"], r["response"])["quality"]

        ours = _by_prompt(sampled, quality)
        theirs = _by_prompt([r for r in against if not r["greedy"]], quality)
        wins = [_compare(x, y) for number in ours for x in ours[number] for y in theirs[number]]
        result["win_rate"] = float(np.mean(wins))
    return result


def pair_metrics(config: Config, evidence: Evidence, labels: np.ndarray) -> dict[str, float]:
    """Measures the reward models' accuracy, reliability and agreement, and the judge's health, on labelled pairs.

    Args:
      evidence: as scoring.score_pairs makes it.
      labels: [P] probability that the first is better; 1/2 is left out of accuracies.
    """
    decisive = labels != 0.5
    right = labels[decisive] > 0.5
    logits = reward_logits(config, evidence)
    result = {f"{name}_accuracy": accuracy(values[decisive], right) for name, values in logits.items()}
    for name, values in logits.items():
        reliable = reliability(values, labels, evidence.lengths)
        result |= {f"{name}_{key}": value for key, value in reliable.items()}
        health = REWARDS[name].health
        found = {} if health is None else health(evidence)
        result |= {key: float(np.mean(values)) for key, values in found.items()}
    if "generative" in logits and "implicit" in logits:
        result["agreement"] = float(np.mean(np.sign(logits["generative"]) * np.sign(logits["implicit"]) > 0))
    return result


def without_own_reference(evidence: Evidence) -> Evidence:
    """Leaves the reference's log-probabilities out where they are the model's own: M1 without SFT, say, is M0."""
    theirs, ours = evidence.cached.get("implicit_logps"), evidence.fresh.get("logps")
    if theirs is None or ours is None or not np.allclose(theirs, ours, atol=1e-6):
        return evidence
    return evidence._replace(cached={name: x for name, x in evidence.cached.items() if name != "implicit_logps"})


def reward_logits(config: Config, evidence: Evidence) -> dict[str, np.ndarray]:
    """Computes the mean logit [P] float64 of the generative and the implicit reward model, and of the method's others.

    Reward models for which the evidence does not suffice are left out.
    """
    wanted = {"generative", "implicit", *config.rewards.models}
    names = [
        name
        for name, reward in REWARDS.items()
        if name in wanted and set(reward.reads) <= set(evidence.fresh) and set(reward.cached) <= set(evidence.cached)
    ]
    logits = rewards.reward_logits(evidence, config, names)
    return {name: np.asarray(values, np.float64).mean(axis=1) for name, values in logits.items()}


def accuracy(logits: np.ndarray, right: np.ndarray) -> float | None:
    """Returns the share of pairs on the right side; a logit of exactly 0 counts 1/2.

    Returns:
      The share, or None without pairs.
    """
    if not len(logits):
        return None
    return float(np.mean(np.where(logits == 0, 0.5, (logits > 0) == right)))


def decision_metrics(directory: Path, grader: Grader | None) -> dict[str, float]:
    """Measures the share of pairs selected in the iteration, and the accuracy of their labels against the grader."""
    pairs = [row for _, row in read_rows(directory / "pairs.jsonl")]
    decisions = [row for _, row in read_rows(directory / "decisions.jsonl")]
    result = {
        "selected": float(np.mean([d["selected"] for d in decisions])),
    }
    if decisions and "agreed" in decisions[0]:
        result["train_agreement"] = float(np.mean([d["agreed"] for d in decisions]))
    if grader is not None:
        gap = [
            grader(p["prompt"], p["response_a"])["quality"] - grader(p["prompt"], p["response_b"])["quality"]
            for p in pairs
        ]
        hits = [(d["label"] > 0.5) == (gap[d["pair"]] > 0) for d in decisions if d["selected"] and gap[d["pair"]] != 0]
        if hits:
            result["label_accuracy"] = float(np.mean(hits))
    return result


def tables_of(number: int, rows: Sequence[dict[str, Any]], folder: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Returns what a person reads of a model: its first held-out answers, and the first pairs that it was trained on.

    Args:
      number: of the model.
      rows: its held-out answers.
      folder: of the iteration that trained it, None for M1.

    Returns:
      name -> at most TABLE_ROWS rows.
    """
    shown = [row for row in rows if not row["greedy"] and row["sample"] == 0][:TABLE_ROWS]
    answers = [
        {name: row[name] for name in ("prompt", "response", "logprob", "stop")}
        | {"model": f"M{number}", "tokens": len(row["response_ids"])}
        for row in shown
    ]
    if folder is None:
        return {"answers": answers}
    pairs = [row for _, row in islice(read_rows(folder / "pairs.jsonl"), TABLE_ROWS)]
    last = {row["pair"]: row for _, row in read_rows(folder / "decisions.jsonl") if row["pair"] < TABLE_ROWS}
    texts, decided = (
        ("prompt", "response_a", "response_b"),
        ("p_generative", "p_implicit", "agreed", "selected", "label"),
    )
    return {
        "answers": answers,
        "pairs": [
            {name: row[name] for name in texts} | {name: last.get(i, {}).get(name) for name in decided}
            for i, row in enumerate(pairs)
        ],
    }


def labelled_pairs(given: Sequence[Pair]) -> tuple[list[Pair], np.ndarray]:
    """Returns pairs and their labels [P]; the labelled-better answer is moved to either side in turn.

    Files of chosen and rejected name the better answer first; a reward model must not profit from that.
    """
    pairs = [pair if i % 2 == 0 else pair.swapped() for i, pair in enumerate(given)]
    return pairs, np.array([0.5 if pair.label is None else pair.label for pair in pairs])


def clean(values: dict[str, Any]) -> dict[str, Any]:
    """Leaves out values that are None or NaN, which JSON does not have."""
    return {k: v for k, v in values.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}


def _prompts(rows: Sequence[dict]) -> dict[int, str]:
    return {row["prompt_number"]: row["prompt"] for row in rows}


def _by_prompt(rows: Sequence[dict], value: Callable[[dict], Any]) -> dict[int, list]:
    result: dict[int, list] = defaultdict(list)
    for row in rows:
        result[row["prompt_number"]].append(value(row))
    return result


def _compare(x: float, y: float) -> float:
    return 0.5 if x == y else float(x > y)
