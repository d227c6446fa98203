"""Calibration, ties and bias for length, against values that are counted one by one."""

import math

import numpy as np
import pytest

from scir_jax.evaluation import reliability as module
from scir_jax.evaluation.reliability import accuracy_by_length, calibration_error, reliability


def slow(logits, labels, lengths):
    """The same measures, pair by pair."""
    p = [1 / (1 + math.exp(-x)) for x in logits]
    bins = {}
    for x, label in zip(p, labels, strict=True):
        confidence = max(x, 1 - x)
        number = min(int((confidence - 0.5) * 20), 9)
        side = 0.5 if x == 0.5 else label if x > 0.5 else 1 - label
        bins.setdefault(number, []).append((confidence, side))
    ece = sum(
        len(found) / len(p) * abs(np.mean([c for c, _ in found]) - np.mean([s for _, s in found]))
        for found in bins.values()
    )
    ours, theirs = [], []
    for logit, label, (a, b) in zip(logits, labels, lengths, strict=True):
        if a != b:
            ours.append(0.5 if logit == 0 else float((logit > 0) == (a > b)))
            theirs.append(label if a > b else 1 - label)
    return {
        "ties": sum(x == 0 for x in logits) / len(p),
        "ece": ece,
        "brier": sum((x - y) ** 2 for x, y in zip(p, labels)) / len(p),
        "length_bias": np.mean(ours) - np.mean(theirs),
    }


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_counting(seed):
    source = np.random.default_rng(seed)
    logits = np.where(source.random(60) < 0.1, 0.0, source.normal(0, 2, 60))
    labels = source.choice([0.0, 0.3, 0.5, 1.0], 60)
    lengths = source.integers(1, 6, (60, 2))
    found = reliability(logits, labels, lengths)
    assert found == pytest.approx(slow(logits, labels, lengths), abs=1e-9)
    # It does not matter which answer stands first.
    assert reliability(-logits, 1 - labels, lengths[:, ::-1]) == pytest.approx(found, abs=1e-9)


def test_the_extremes():
    # Of ten pairs at 0.8 eight are right: calibrated. All of them at certainty: off by 0.2.
    labels = np.array([1.0] * 8 + [0.0] * 2)
    assert calibration_error(np.full(10, 0.8), labels) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.ones(10), labels) == pytest.approx(0.2, abs=1e-12)
    same = np.ones((10, 2), int)
    assert "length_bias" not in reliability(np.ones(10), labels, same)
    # Always the longer one, of which half are better.
    longer = np.array([[2, 1], [1, 2]] * 5)
    found = reliability(np.array([1.0, -1.0] * 5), np.ones(10), longer)
    assert found["length_bias"] == pytest.approx(0.5)


def test_accuracy_by_length_difference():
    lengths = np.array([[1, 9], [1, 9], [4, 4], [9, 1], [2, 9], [5, 5]])
    labels = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.5])
    logits = np.array([-1.0, 1.0, 0.0, 1.0, -1.0, 3.0])
    assert accuracy_by_length(logits, labels, lengths) == [
        {"from": -8, "to": -8, "pairs": 2, "accuracy": 0.5},
        {"from": 0, "to": 0, "pairs": 1, "accuracy": 0.5},
        {"from": 7, "to": 7, "pairs": 1, "accuracy": 1.0},
        {"from": 8, "to": 8, "pairs": 1, "accuracy": 1.0},
    ]
    assert accuracy_by_length(logits[:1], np.array([0.5]), lengths[:1]) == []
    many = np.random.default_rng(0).integers(1, 100, (500, 2))
    found = accuracy_by_length(np.ones(500), np.ones(500), many)
    assert sum(row["pairs"] for row in found) == 500 and len(found) == module.LENGTH_BINS
    assert all(row["pairs"] > 80 and row["accuracy"] == 1 for row in found)
    assert all(a["to"] < b["from"] for a, b in zip(found, found[1:]))
