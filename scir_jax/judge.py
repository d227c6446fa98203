"""python -m scir_jax.judge: both reward models' probabilities for a file of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scir_jax.config import cli
from scir_jax.config.checks import check_positive, resolve
from scir_jax.run import command

SECTIONS = ("run", "world", "model", "lora", "mesh", "data", "text", "generative", "implicit", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    config, own, given = cli.line(
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
            "summary": (str | None, None, "JSON file to write: what is printed, as numbers by name"),
            "with_ids": (bool, False, "add each judge row's token ids, verdict position and verdict ids"),
        },
    )
    from scir_jax.data import records
    from scir_jax.data.jsonl import write_json, write_rows
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import auto, console, hub, judging, scoring
    from scir_jax.run.setup import prepare

    config = resolve(config)
    command.join(config)
    # The input's prompts and answers are those whose tokens count.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, pairs=own["input"]))
    config = auto.settle(config, given, ("text", "devices", "inference"), sections=SECTIONS)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, pairs=None))
    check_positive(config, "text", "generative", "evaluate")
    output = hosts.together(lambda: cli.output_file(own["output"]))
    summary_file = hosts.together(lambda: cli.output_file(own["summary"])) if own["summary"] else None
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
    total = scoring.score_count(len(pairs), with_reference=bool(reference), rated=encoder.pointwise is not None)
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
    rows = judging.judged_rows(config, encoder, pairs, rows, evidence, with_ids=own["with_ids"])
    if not hosts.first():
        return 0
    write_rows(output, rows)
    summary, lengths = judging.judged_summary(config, pairs, evidence), judging.by_length(config, pairs, evidence)
    if summary_file:
        write_json(summary_file, {"pairs": len(rows), **summary, "accuracy_by_length": lengths})
    print(f"{'pairs':<24} {len(rows)}")
    for name, value in summary.items():
        print(f"{name:<24} {value:.4f}")
    for name, bins in lengths.items():
        for found in bins:
            tokens = f"{found['from']:+d} to {found['to']:+d} tokens"
            print(f"{name:<12} {tokens:<22} {found['accuracy']:.4f}  ({found['pairs']} pairs)")
    return 0


if __name__ == "__main__":
    command.main(main)
