"""What both reward models say of pairs, as rows: the judge command's file, and the answer of `Model.judge`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.pairs import Pair
from scir_jax.evaluation.reliability import accuracy_by_length, reliability
from scir_jax.method.rewards import REWARDS, Evidence, single_verdicts
from scir_jax.run.evaluation import accuracy, reward_logits


def judged_rows(
    config: Config,
    encoder: Encoder,
    pairs: Sequence[Pair],
    rows: Sequence[dict[str, Any]],
    evidence: Evidence,
    *,
    with_ids: bool = False,
) -> list[dict[str, Any]]:
    """Adds to each pair's row what the reward models say of it.

    Args:
      rows: one per pair, as it was given.
      evidence: of the pairs, as scoring.score_pairs makes it.
      with_ids: add the token ids, verdict position and verdict ids of every judge row.

    Returns:
      The rows with p_generative, slot_bias and verdict_mass; where the evidence holds log-probabilities also
      p_implicit, agreed, and the log-probabilities of both answers, nats summed over tokens.
    """
    logits, health = reward_logits(config, evidence), _health(evidence)
    generative, implicit = logits["generative"], logits.get("implicit")
    result = []
    for i, given in enumerate(rows):
        row = {**given, "p_generative": _sigmoid(generative[i])}
        row |= {name: float(health[name][i]) for name in ("slot_bias", "verdict_mass")}
        if implicit is not None:
            row["p_implicit"] = _sigmoid(implicit[i])
            row["agreed"] = bool(generative[i] * implicit[i] > 0)
            row["logps"] = [float(x) for x in evidence.fresh["logps"][i]]
            row["reference_logps"] = [float(x) for x in evidence.cached["implicit_logps"][i]]
        if with_ids:
            row["judge_rows"] = _judge_rows(encoder, pairs[i], evidence.fresh["verdicts"][i])
        result.append(row)
    return result


def judged_summary(config: Config, pairs: Sequence[Pair], evidence: Evidence) -> dict[str, float]:
    """Computes means over pairs: the judge's health, the agreement, and on the labelled pairs accuracies and reliability.

    Returns:
      name -> value: slot_bias (nats), slot_a_rate (share of single verdicts for the answer that is shown as A), flip_rate,
      verdict_mass; per reward model NAME_accuracy and what reliability.reliability measures; agreement.
    """
    logits = reward_logits(config, evidence)
    labels = _labels(pairs)
    known, decisive = ~np.isnan(labels), ~np.isnan(labels) & (labels != 0.5)
    summary = {name: float(values.mean()) for name, values in _health(evidence).items()}
    # In favour of the first answer, which is shown as A in every other verdict.
    verdicts = single_verdicts(np.asarray(evidence.fresh["verdicts"])).reshape(len(pairs), -1, 2) * [1, -1]
    summary["slot_a_rate"] = float(np.mean(0.5 + 0.5 * np.sign(verdicts)))
    if decisive.any():
        summary |= {f"{name}_accuracy": accuracy(x[decisive], labels[decisive] > 0.5) for name, x in logits.items()}
    if known.any():
        for name, x in logits.items():
            found = reliability(x[known], labels[known], evidence.lengths[known])
            summary |= {f"{name}_{key}": value for key, value in found.items()}
    if "implicit" in logits:
        summary["agreement"] = float(np.mean(logits["generative"] * logits["implicit"] > 0))
    return summary


def by_length(config: Config, pairs: Sequence[Pair], evidence: Evidence) -> dict[str, list[dict[str, Any]]]:
    """Computes the accuracy of each reward model on the labelled pairs, by how much longer the better answer is."""
    labels = _labels(pairs)
    known = ~np.isnan(labels)
    logits = reward_logits(config, evidence)
    return {name: accuracy_by_length(x[known], labels[known], evidence.lengths[known]) for name, x in logits.items()}


def _labels(pairs: Sequence[Pair]) -> np.ndarray:
    return np.array([np.nan if pair.label is None else pair.label for pair in pairs])


def _health(evidence: Evidence) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in REWARDS["generative"].health(evidence).items()}


def _judge_rows(encoder: Encoder, pair: Pair, verdicts: np.ndarray) -> list[dict[str, Any]]:
    """Returns every judge row of a pair: what another implementation needs to check the probability."""
    return [
        {
            "template": judge.template.name,
            "shown_as_a": "ab"[order],
            "ids": list(row.ids),
            "verdict_position": len(row.ids) - 1,
            "verdict_ids": list(judge.verdict_ids),
            "verdict_logits": [float(x) for x in verdicts[g, order]],
        }
        for g, judge in enumerate(encoder.judges)
        for order, row in enumerate(encoder.judge_rows(judge, pair))
    ]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
