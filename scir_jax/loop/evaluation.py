"""Evaluation of M1, M2, ...: both reward models on held-out labelled pairs, and held-out responses by a grader.

The grader is used here and nowhere else; training never sees it.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.data import records
from scir_jax.data.encode import EncodedPair
from scir_jax.data.files import read_rows
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.errors import InputError
from scir_jax.loop import console, scoring
from scir_jax.loop.sampling import sample_rows
from scir_jax.loop.session import Session
from scir_jax.method import rewards

Grader = Callable[[str, str], dict[str, float]]


def load_grader(name: str | None) -> Grader | None:
    """The function `module:function`. InputError where it cannot be imported."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"evaluate.grader {name!r} cannot be imported (module:function): {error}") from None


def evaluate_responses(session: Session, params, iteration: int, stopper: console.Stopper, bar) -> list[dict[str, Any]]:
    """Sampled (and one greedy) responses to the held-out prompts; a row a response, `greedy` says which."""
    config = session.config
    prompts = list(enumerate(session.data.heldout_prompts))
    key = stream_key(config.run.seed, "evaluation", 0)  # the same noise for every model: fewer chances in a comparison
    kinds = [
        (
            False,
            config.evaluate.samples,
            Sampling.of(config.sample.temperature, config.sample.top_p, config.sample.top_k),
        )
    ]
    if config.evaluate.greedy:
        kinds.append((True, 1, Sampling.of(0.0)))
    rows = []
    for greedy, responses, sampling in kinds:
        for part in records.batched(prompts, config.sample.batch_size):
            stopper.check(f"evaluation of M{iteration + 1}")
            for row in sample_rows(session, params, part, responses=responses, sampling=sampling, key=key):
                rows.append({"greedy": greedy, **row})
            bar.advance()
    return rows


def response_metrics(rows: Sequence[dict], grader: Grader | None, against: Sequence[dict] | None) -> dict[str, float]:
    """Length, end-of-sequence rate and diversity of sampled responses; with a grader quality and the win rate.

    Args:
      against: M1's responses to the same prompts; the win rate is over all pairs of samples, ties count 1/2.
    """
    sampled = [r for r in rows if not r["greedy"]]
    result = {
        "length": float(np.mean([len(r["response_ids"]) for r in sampled])),
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
    if against is not None:

        def quality(r: dict) -> float:
            return grader(r["prompt"], r["response"])["quality"]

        ours = _by_prompt(sampled, quality)
        theirs = _by_prompt([r for r in against if not r["greedy"]], quality)
        wins = [_compare(x, y) for number in ours for x in ours[number] for y in theirs[number]]
        result["win_rate"] = float(np.mean(wins))
    return result


def response_batches(session: Session) -> int:
    """How often `evaluate_responses` advances its bar."""
    kinds = 2 if session.config.evaluate.greedy else 1
    return kinds * scoring.batches_of(len(session.data.heldout_prompts), session.config.sample.batch_size)


def pair_metrics(session: Session, scores: scoring.PairScores, labels: np.ndarray) -> dict[str, float]:
    """Accuracy of both reward models, agreement and the judge's health on labelled pairs.

    Args:
      labels: [P] probability that the first is better; 1/2 is left out of accuracies.
    """
    decisive = labels != 0.5
    right = labels[decisive] > 0.5
    judged = judge_summary(scores)
    result = {
        "generative_accuracy": accuracy(judged["logit"][decisive], right),
        "slot_bias": float(np.mean(judged["slot_bias"])),
        "flip_rate": float(np.mean(judged["flip"])),
        "verdict_mass": float(np.mean(scores.judged.mass)),
    }
    if scores.logps is not None:
        implicit = implicit_logits(session, scores)
        result["implicit_accuracy"] = accuracy(implicit[decisive], right)
        result["agreement"] = float(np.mean(np.sign(judged["logit"]) * np.sign(implicit) > 0))
    return result


def judge_summary(scores: scoring.PairScores) -> dict[str, np.ndarray]:
    """`logit`, `slot_bias` and `flip` of the generative reward model, means over its templates, float64 [P]."""
    verdicts = scores.judged.verdicts
    templates = [rewards.generative(verdicts[:, g]) for g in range(verdicts.shape[1])]
    return {k: np.mean([np.asarray(t[k], np.float64) for t in templates], axis=0) for k in templates[0]}


def implicit_logits(session: Session, scores: scoring.PairScores) -> np.ndarray:
    """The implicit reward model's logits [P] outside training; a length penalty is fitted to these pairs."""
    settings = session.config.implicit
    logps, reference_logps, lengths = scores.logps, scores.reference_logps, scores.lengths
    alpha = 0.0
    if settings.length == "penalty":
        alpha = rewards.fit_length_penalty(settings.beta * (logps - reference_logps), lengths)
    penalty = np.float32(alpha) * lengths
    logits = rewards.implicit(logps, reference_logps, lengths, penalty, beta=settings.beta, length=settings.length)
    return np.asarray(logits, np.float64)


def accuracy(logits: np.ndarray, right: np.ndarray) -> float | None:
    """Share of pairs on the right side; a logit of exactly 0 counts 1/2. None without pairs."""
    if not len(logits):
        return None
    return float(np.mean(np.where(logits == 0, 0.5, (logits > 0) == right)))


def decision_metrics(directory: Path, grader: Grader | None) -> dict[str, float]:
    """Share of pairs selected during the iteration, and the accuracy of their labels against the grader."""
    pairs = [row for _, row in read_rows(directory / "pairs.jsonl")]
    decisions = [row for _, row in read_rows(directory / "decisions.jsonl")]
    result = {
        "selected": float(np.mean([d["selected"] for d in decisions])),
        "train_agreement": float(np.mean([d["agreed"] for d in decisions])),
    }
    if grader is not None:
        gap = [
            grader(p["prompt"], p["response_a"])["quality"] - grader(p["prompt"], p["response_b"])["quality"]
            for p in pairs
        ]
        hits = [(d["label"] > 0.5) == (gap[d["pair"]] > 0) for d in decisions if d["selected"] and gap[d["pair"]] != 0]
        if hits:
            result["label_accuracy"] = float(np.mean(hits))
    return result


def labelled_pairs(
    given: Sequence[EncodedPair],
) -> tuple[list[scoring.Pair], np.ndarray]:
    """Pairs and their labels. The labelled-better answer is moved to either side in turn.

    Files of chosen and rejected name the better answer first; a reward model must not profit from that.
    """
    pairs, labels = [], []
    for i, (comparison, prompt, a, b) in enumerate(given):
        label = 0.5 if comparison.label is None else comparison.label
        pairs.append((prompt, a, b) if i % 2 == 0 else (prompt, b, a))
        labels.append(label if i % 2 == 0 else 1 - label)
    return pairs, np.array(labels)


def clean(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is absent; JSON has no NaN."""
    return {k: v for k, v in values.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _by_prompt(rows: Sequence[dict], value: Callable[[dict], Any]) -> dict[int, list]:
    result: dict[int, list] = defaultdict(list)
    for row in rows:
        result[row["prompt_number"]].append(value(row))
    return result


def _compare(x: float, y: float) -> float:
    return 0.5 if x == y else float(x > y)
