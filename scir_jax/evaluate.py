"""python -m scir_jax.evaluate: a run's models, or a model directory, on held-out prompts and labelled pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from scir_jax.config import cli
from scir_jax.config.checks import check_positive, check_sampling, resolve
from scir_jax.config.names import run_directory
from scir_jax.config.schema import Config
from scir_jax.errors import InputError
from scir_jax.run import command

SECTIONS = ("world", "model", "lora", "mesh", "data", "text", "sample", "generative", "implicit", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    config, own = cli.parse(
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
            "distributed": (bool, False, "this is one of several processes, one per host, as run.distributed of train"),
        },
    )
    from scir_jax.data.jsonl import write_json
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import console
    from scir_jax.run.runs import Run

    if own["run"]:
        run = Run(run_directory(own["run"]), distributed=own["distributed"])
        console.print_table(run.evaluate(again=own["again"]), own["run"], run.marked)
        return 0
    config = cli.distributed(config, own["distributed"])
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


if __name__ == "__main__":
    command.main(main)
