"""python -m scir_jax.judge: both reward models' probabilities for a file of pairs."""

from __future__ import annotations

from collections.abc import Sequence

from scir_jax.config import cli
from scir_jax.config.checks import check_positive, resolve
from scir_jax.run import command

SECTIONS = ("run", "world", "model", "lora", "mesh", "data", "text", "generative", "implicit", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    config, own = cli.parse(
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
    from scir_jax.data.jsonl import write_rows
    from scir_jax.engine.hosts import hosts
    from scir_jax.method.rewards import REWARDS
    from scir_jax.run import console, hub, scoring
    from scir_jax.run.evaluation import accuracy, reward_logits
    from scir_jax.run.setup import prepare

    config = resolve(config)
    check_positive(config, "text", "generative", "evaluate")
    command.join(config)
    output = hosts.together(lambda: cli.output_file(own["output"]))
    found: dict[str, list] = {}

    def read(encoder, inputs):
        tally = inputs.tally("input", own["input"])
        given = records.read_comparisons_with_rows(own["input"], config.data.columns, tally)
        row_at = {comparison.where: row for comparison, row in given}
        found["pairs"] = inputs.encode_pairs("input", [comparison for comparison, _ in given])
        found["rows"] = [row_at[pair.prompt.where] for pair in found["pairs"]]
        return encoder.lengths([pair.prompt for pair in found["pairs"]])

    encoder, inputs, programs, parameters = hosts.together(lambda: prepare(config, read))
    pairs, rows = found["pairs"], found["rows"]
    inputs.tell_left_out()
    reference = own["reference"]
    place = hub.directory(reference, "--reference") if reference else None
    load_reference = (lambda: parameters.of_directory(place, inference=True)) if place else None
    total = scoring.score_count(len(pairs), with_reference=bool(reference))
    with console.stage("judge", total) as bar:
        evidence = scoring.score_pairs(
            encoder,
            programs,
            pairs,
            config=config,
            model=parameters.configured,
            reference=load_reference,
            advance=lambda by: bar.advance(by=by),
        )
    logits = reward_logits(config, evidence)
    generative, implicit = logits["generative"], logits.get("implicit")
    health = {name: np.asarray(x) for name, x in REWARDS["generative"].health(evidence).items()}
    for i, row in enumerate(rows):
        row["p_generative"] = _sigmoid(generative[i])
        row["slot_bias"] = float(health["slot_bias"][i])
        row["verdict_mass"] = float(health["verdict_mass"][i])
        if implicit is not None:
            row["p_implicit"] = _sigmoid(implicit[i])
            row["agreed"] = bool(generative[i] * implicit[i] > 0)
            row["logps"] = [float(x) for x in evidence.fresh["logps"][i]]
            row["reference_logps"] = [float(x) for x in evidence.cached["implicit_logps"][i]]
        if own["with_ids"]:
            row["judge_rows"] = _judge_rows(encoder, pairs[i], evidence.fresh["verdicts"][i])
    if not hosts.first():
        return 0
    write_rows(output, rows)

    labels = np.array([np.nan if pair.label is None else pair.label for pair in pairs])
    known = ~np.isnan(labels) & (labels != 0.5)
    summary = {"pairs": len(rows), **{name: values.mean() for name, values in health.items()}}
    if known.any():
        summary |= {f"{name}_accuracy": accuracy(x[known], labels[known] > 0.5) for name, x in logits.items()}
    if implicit is not None:
        summary["agreement"] = np.mean(generative * implicit > 0)
    for name, value in summary.items():
        print(f"{name:<20} {value:.4f}" if name != "pairs" else f"{name:<20} {value}")
    return 0


def _judge_rows(encoder, pair, verdicts) -> list[dict]:
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
    import math

    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


if __name__ == "__main__":
    command.main(main)
