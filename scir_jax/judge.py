"""python -m scir_jax.judge: both reward models' probabilities for a file of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scir_jax import options

SECTIONS = ("run", "world", "model", "lora", "mesh", "data", "text", "generative", "implicit", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    config, own = options.parse(
        "judge",
        __doc__,
        argv,
        sections=SECTIONS,
        options={
            "input": (str, ..., "JSONL file of prompt, response_a, response_b (or prompt, chosen, rejected)"),
            "output": (str, ..., "JSONL file to write: the rows with p_generative, p_implicit, agreed, ..."),
            "reference": (
                str | None,
                None,
                "model directory of the implicit reward's reference; without one no p_implicit",
            ),
            "with_ids": (bool, False, "add each judge row's token ids, verdict position and verdict ids"),
        },
    )
    import numpy as np

    from scir_jax.data import records
    from scir_jax.engine import hosts
    from scir_jax.loop import console, scoring
    from scir_jax.loop.evaluation import accuracy, implicit_logits, judge_summary
    from scir_jax.loop.session import Session, check_positive, resolve

    config = resolve(config)
    check_positive(config, "text", "generative", "evaluate")
    options.join(config)
    output = hosts.together(lambda: options.output_file(own["output"]))
    session = hosts.together(lambda: Session(config))
    encoded, rows = hosts.together(lambda: _read(session, own["input"]))
    session.data.tell_left_out()
    session.data.shapes_for([pair.prompt for pair in encoded])
    pairs = [(pair.prompt, pair.a, pair.b) for pair in encoded]
    reference = own["reference"]
    load_reference = (lambda: session.import_params(Path(reference), inference=True)) if reference else None
    with console.stage("judge", scoring.score_batches(session, len(pairs), with_reference=bool(reference))) as bar:
        scores = scoring.score_pairs(
            session,
            pairs,
            model=session.inference_params,
            reference=load_reference,
            advance=bar.advance,
        )
    judged = judge_summary(scores)
    generative = judged["logit"]
    implicit = implicit_logits(session, scores) if reference else None
    for i, row in enumerate(rows):
        row["p_generative"] = _sigmoid(generative[i])
        row["slot_bias"] = float(judged["slot_bias"][i])
        row["verdict_mass"] = float(scores.judged.mass[i].mean())
        if implicit is not None:
            row["p_implicit"] = _sigmoid(implicit[i])
            row["agreed"] = bool(generative[i] * implicit[i] > 0)
            row["logps"] = [float(x) for x in scores.logps[i]]
            row["reference_logps"] = [float(x) for x in scores.reference_logps[i]]
        if own["with_ids"]:
            row["judge_rows"] = _judge_rows(session, pairs[i], scores.judged.verdicts[i])
    if not hosts.first():
        return 0
    records.write_rows(output, rows)

    labels = np.array([np.nan if p.comparison.label is None else p.comparison.label for p in encoded])
    known = ~np.isnan(labels) & (labels != 0.5)
    summary = {"pairs": len(rows), "slot_bias": judged["slot_bias"].mean(), "verdict_mass": scores.judged.mass.mean()}
    summary["flip_rate"] = judged["flip"].mean()
    if known.any():
        summary["generative_accuracy"] = accuracy(generative[known], labels[known] > 0.5)
        if implicit is not None:
            summary["implicit_accuracy"] = accuracy(implicit[known], labels[known] > 0.5)
    if implicit is not None:
        summary["agreement"] = np.mean(generative * implicit > 0)
    for name, value in summary.items():
        print(f"{name:<20} {value:.4f}" if name != "pairs" else f"{name:<20} {value}")
    return 0


def _read(session, path: str) -> tuple[list, list[dict]]:
    """The file's pairs that are not left out, encoded, and their rows."""
    from scir_jax.data import records

    tally = session.data.tally("input", path)
    given = records.read_comparisons_with_rows(path, session.config.data.columns, tally)
    encoded = session.data.encode_pairs("input", [comparison for comparison, _ in given])
    row_at = {comparison.where: row for comparison, row in given}
    return encoded, [row_at[pair.comparison.where] for pair in encoded]


def _judge_rows(session, pair, verdicts) -> list[dict]:
    """Every judge row of a pair: what another implementation needs to check the probability."""
    prompt, a, b = pair
    result = []
    for g, judge in enumerate(session.judges):
        for order, (first, second) in enumerate(((a, b), (b, a))):
            ids = session.encoder.judge_row(judge, prompt, first, second).ids
            result.append(
                {
                    "template": judge.template.name,
                    "shown_as_a": "ab"[order],
                    "ids": list(ids),
                    "verdict_position": len(ids) - 1,
                    "verdict_ids": list(judge.verdict_ids),
                    "verdict_logits": [float(x) for x in verdicts[g, order]],
                }
            )
    return result


def _sigmoid(x: float) -> float:
    import math

    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


if __name__ == "__main__":
    options.main(main)
