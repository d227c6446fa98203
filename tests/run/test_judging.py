"""What judge says of a labelled file beside its rows, recomputed from the rows."""

import json

import numpy as np
import pytest

from scir_jax import judge
from tests.run.runs import lines, write_lines

pytestmark = pytest.mark.usefixtures("shared_programs")


def test_the_summary_is_that_of_the_rows(world_dir, judging, command, tmp_path):
    pairs = lines(world_dir / "heldout_pairs.jsonl")[:6]
    given = [
        {"prompt": row["prompt"], "response_a": row["chosen"], "response_b": row["rejected"], "label": label}
        for row, label in zip(pairs, [1, 0, 1, 0.5, 0.75, None], strict=True)
    ]
    source, output, summary = (tmp_path / name for name in ("pairs.jsonl", "judged.jsonl", "summary.json"))
    write_lines(source, given)
    files = ("--input", source, "--output", output, "--summary", summary, "--with_ids")
    done = command(judge.main, *judging, *files)
    assert done.code == 0, done.err
    found, rows = json.loads(summary.read_text()), lines(output)
    letters = [np.subtract(*r["verdict_logits"]) for row in rows for r in row["judge_rows"]]
    assert found["slot_a_rate"] == pytest.approx(np.mean([0.5 + 0.5 * np.sign(z) for z in letters]))
    p, label = (np.array([row[key] for row in rows[:5]]) for key in ("p_generative", "label"))
    assert found["generative_brier"] == pytest.approx(np.mean((p - label) ** 2), abs=1e-6)
    assert found["generative_ties"] == np.mean(p == 0.5)
    decisive = label != 0.5
    right = np.where(p == 0.5, 0.5, (p > 0.5) == (label > 0.5))[decisive]
    assert found["generative_accuracy"] == pytest.approx(right.mean())
    bins = found["accuracy_by_length"]["generative"]
    assert sum(row["pairs"] for row in bins) == decisive.sum()
    assert sum(row["pairs"] * row["accuracy"] for row in bins) == pytest.approx(right.sum())
    assert found["pairs"] == 6 and f"{found['generative_ece']:.4f}" in done.out and "tokens" in done.out
    # Without labels nobody knows how good it is.
    for row in given:
        del row["label"]
    write_lines(source, given)
    assert command(judge.main, *judging, *files).code == 0
    found = json.loads(summary.read_text())
    assert found["accuracy_by_length"] == {"generative": []} and not {"generative_ece", "generative_accuracy"} & set(
        found
    )
