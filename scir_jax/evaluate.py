"""python -m scir_jax.evaluate: a run's models, or a model directory, on held-out prompts and labelled pairs.

With --benchmark a model directory's reward models on the rows of a benchmark.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, Literal

from scir_jax.config import cli
from scir_jax.config.checks import check_positive, check_sampling, resolve
from scir_jax.config.names import run_directory
from scir_jax.config.schema import Config, DataConfig
from scir_jax.errors import InputError
from scir_jax.run import command

SECTIONS = ("world", "model", "lora", "mesh", "data", "text", "sample", "generative", "implicit", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    config, own, given = cli.line(
        "evaluate",
        __doc__,
        argv,
        sections=SECTIONS,
        options={
            "run": (str | None, None, "run directory: print its models' evaluations, evaluating again with --again"),
            "again": (bool, False, "with --run: evaluate all of its models anew, with the run's configuration"),
            "reference": (
                str | None,
                None,
                "model directory: reference of the implicit reward, without one it is left out",
            ),
            "output": (str | None, None, "evaluation.json to write for a model directory"),
            "benchmark": (Literal["rewardbench"] | None, None, "score the reward models on this benchmark's rows"),
            "input": (str | None, None, "with --benchmark: its rows, a file or data set; RewardBench 1 or 2"),
            "rewards": (
                str | None,
                None,
                "with --benchmark: JSONL file to write, the rows with every answer's rewards",
            ),
            "distributed": (bool, False, "this is one of several processes, one per host, as run.distributed of train"),
        },
    )
    from scir_jax.data.jsonl import write_json
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import console
    from scir_jax.run.runs import Run

    if own["again"] and not own["run"]:
        raise InputError("--again evaluates the models of a run: give --run RUN too")
    if own["run"]:
        run = Run(run_directory(own["run"]), distributed=own["distributed"])
        if beside := sorted(given - {"run", "again", "distributed"}):
            raise InputError(
                f"--run {own['run']} is evaluated with the settings of the run: leave out --{', --'.join(beside[:3])}; "
                "what may change under a run (evaluate, held-out data) is changed by train, and evaluated with --again"
            )
        console.print_table(run.evaluate(again=own["again"]), own["run"], run.marked)
        return 0
    config = cli.distributed(config, own["distributed"])
    if own["benchmark"]:
        return _benchmark(config, own, given)
    if not (config.data.heldout_prompts or config.data.heldout_pairs):
        raise InputError("nothing to evaluate on: give --data.heldout_prompts or --data.heldout_pairs (or --run RUN)")
    command.join(config)
    output = hosts.together(lambda: cli.output_file(own["output"] or "evaluation.json"))
    values = _directory(config, own["reference"])
    if hosts.first():
        write_json(output, values)
    console.print_table([values], config.model.path)
    console.say(f"written: {output}")
    return 0


def _directory(config: Config, reference: str | None) -> dict:
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import console, evaluation, hub
    from scir_jax.run.setup import prepare

    config = resolve(config)
    check_positive(config, "text", "sample", "generative", "evaluate")
    check_sampling(config)
    data = dataclasses.replace(config.data, prompts=None, ift=None, eft=None, pairs=None)
    config = dataclasses.replace(config, data=data)
    grader, setup = hosts.together(lambda: (evaluation.load_grader(config.evaluate.grader), prepare(config)))
    encoder, inputs, programs, parameters = setup
    inputs.tell_left_out()
    place = hub.directory(reference, "--reference") if reference else None
    with console.Stopper() as stopper:
        values, _ = evaluation.evaluate(
            config,
            encoder,
            inputs,
            programs,
            model=functools.cache(parameters.configured),
            reference=(lambda: parameters.of_directory(place, inference=True)) if place else None,
            grader=grader,
            title="evaluate",
            check=lambda: stopper.check("evaluation", resumable=False),
        )
    return evaluation.clean({"model": config.model.path, **values})


def _benchmark(config: Config, own: dict[str, Any], given: Collection[str]) -> int:
    from scir_jax.data import records, statistics
    from scir_jax.data.jsonl import write_json, write_rows
    from scir_jax.data.tally import Tally
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import auto, benchmark, console, hub
    from scir_jax.run.setup import prepare

    if not own["input"]:
        raise InputError("--benchmark needs --input, the file or the data set of its rows")
    config = resolve(dataclasses.replace(config, data=DataConfig(columns=config.data.columns)))
    command.join(config)
    output = hosts.together(lambda: cli.output_file(own["output"] or "rewardbench.json"))
    rewards = hosts.together(lambda: cli.output_file(own["rewards"])) if own["rewards"] else None
    tally = Tally(own["input"])
    rows = hosts.together(lambda: records.read_choices(own["input"], config.data.columns, tally))
    version = benchmark.version(rows)
    if "model.path" in given and not config.world.directory:
        config = auto.settle(
            dataclasses.replace(config, run=dataclasses.replace(config.run, auto=True)),
            given,
            ("text", "devices", "inference"),
            sections=SECTIONS,
            pairs=[records.Comparison(row.messages, row.right[0], text, 1.0) for row in rows for text in row.wrong],
        )
    check_positive(config, "text", "generative", "evaluate")
    found: list[benchmark.Question] = []

    def read(encoder, _):
        found.extend(benchmark.questions(encoder, rows, tally))
        return encoder.lengths([question.prompt for question in found])

    encoder, _, programs, parameters = hosts.together(lambda: prepare(config, read))
    for sentence in (*statistics.left_out({"input": tally}), *benchmark.cut(found)):
        console.say(sentence)
    place = hub.directory(own["reference"], "--reference") if own["reference"] else None
    with (
        console.Stopper() as stopper,
        console.stage("rewards", benchmark.count(found, with_reference=place is not None)) as bar,
    ):

        def advance(by: int) -> None:
            bar.advance(by=by)
            stopper.check("benchmark", resumable=False)

        scored = benchmark.rewards(
            config,
            encoder,
            programs,
            found,
            model=functools.cache(parameters.configured),
            reference=(lambda: parameters.of_directory(place, inference=True)) if place else None,
            advance=advance,
        )
    values = benchmark.results(found, scored, version=version)
    if not hosts.first():
        return 0
    write_json(output, {"model": config.model.path, "benchmark": own["benchmark"], **values})
    if rewards:
        write_rows(rewards, benchmark.reward_rows(found, scored))
    print(benchmark.table(values))
    console.say(f"written: {output}{f', {rewards}' if rewards else ''}")
    return 0


if __name__ == "__main__":
    command.main(main)
