"""python -m scir_jax.evaluate: a run's models, or a model directory, on held-out prompts and labelled pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from scir_jax.config import cli
from scir_jax.config.checks import check_positive, check_sampling, resolve
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

    if own["run"]:
        rows = _run(Path(own["run"]), own["again"], own["distributed"])
        console.print_table(rows, own["run"])
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


def _run(path: Path, again: bool, distributed: bool) -> list[dict]:
    from scir_jax.data.jsonl import read_json

    if again:
        return _again(path, cli.of_run(path, distributed))
    cli.of_run(path)
    evaluations = sorted(path.glob("iteration_*/evaluation.json"))
    if not evaluations:
        raise InputError(f"{path}: no model is evaluated yet; run train on, or give --again true")
    return [read_json(file) for file in evaluations]


def _again(path: Path, config: Config) -> list[dict]:
    """Evaluates all models of a run anew, on the devices that are here."""
    from scir_jax.data.jsonl import read_json, write_json
    from scir_jax.engine import mesh
    from scir_jax.engine.checkpoint import ModelStore
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import console, evaluation, iteration
    from scir_jax.run.directory import RunDirectory
    from scir_jax.run.metrics import NoMetrics
    from scir_jax.run.models import Models
    from scir_jax.run.setup import prepare

    command.join(config)
    config = dataclasses.replace(config, mesh=mesh.fitting(config.mesh))
    directory = RunDirectory(path)
    try:
        hosts.decide(lambda: directory.open(config))
        with console.Stopper() as stopper:
            hosts.together(lambda: directory.keep_models(config))
            encoder, inputs, programs, parameters = hosts.together(lambda: prepare(config))
            models = Models(ModelStore(directory.checkpoints), programs, parameters)
            grader = hosts.together(lambda: evaluation.load_grader(config.evaluate.grader))
            last = models.store.latest()
            if not last:
                raise InputError(f"{path}: no model beyond M0 to evaluate yet")
            needs = (config, encoder, inputs, programs, models, directory, NoMetrics(), grader, stopper)
            for t in range(last):
                evaluation.evaluate_model(*needs, t)
            if hosts.first() and (path / "summary.json").exists():
                write_json(path / "summary.json", {"rows": iteration.rows(directory, config.run.iterations)})
            return hosts.decide(lambda: [read_json(directory.iteration(t) / "evaluation.json") for t in range(last)])
    finally:
        if hosts.first():
            directory.close()


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
