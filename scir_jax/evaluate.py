"""python -m scir_jax.evaluate: a run's models, or a model directory, on held-out prompts and labelled pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from scir_jax import options
from scir_jax.config import Config

SECTIONS = ("world", "model", "lora", "mesh", "data", "text", "sample", "generative", "implicit", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    config, own = options.parse(
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
            "distributed": (bool, False, "this is one of several processes, one a host, as run.distributed of train"),
        },
    )
    from scir_jax.engine import hosts
    from scir_jax.errors import InputError
    from scir_jax.loop import console

    if own["run"]:
        rows = _run(Path(own["run"]), own["again"], own["distributed"])
        console.print_table(rows, own["run"])
        return 0
    config = options.distributed(config, own["distributed"])
    if not (config.data.heldout_prompts or config.data.heldout_pairs):
        raise InputError("nothing to evaluate on: give --data.heldout_prompts or --data.heldout_pairs (or --run RUN)")
    options.join(config)
    output = hosts.together(lambda: options.output_file(own["output"] or "evaluation.json"))
    values = _directory(config, own["reference"])
    from scir_jax.data.records import write_json

    if hosts.first():
        write_json(output, values)
    console.print_table([values], config.model.path)
    console.say(f"written: {output}")
    return 0


def _run(path: Path, again: bool, distributed: bool) -> list[dict]:
    from scir_jax.errors import InputError
    from scir_jax.loop.evaluation import read_json

    if again:
        return _again(path, options.of_run(path, distributed))
    options.of_run(path)
    evaluations = sorted(path.glob("iteration_*/evaluation.json"))
    if not evaluations:
        raise InputError(f"{path}: no model is evaluated yet; run train on, or give --again true")
    return [read_json(file) for file in evaluations]


def _again(path: Path, config: Config) -> list[dict]:
    """Evaluates all models of a run anew, on the devices that are here."""
    from scir_jax.data.records import write_json
    from scir_jax.engine import hosts, mesh
    from scir_jax.engine.metrics import NoMetrics
    from scir_jax.errors import InputError
    from scir_jax.loop import console
    from scir_jax.loop.directory import RunDirectory
    from scir_jax.loop.evaluation import read_json
    from scir_jax.loop.iteration import Run
    from scir_jax.loop.session import Session

    options.join(config)
    config = dataclasses.replace(config, mesh=mesh.fitting(config.mesh))
    directory = RunDirectory(path)
    try:
        hosts.decide(lambda: directory.open(config))
        with console.Stopper() as stopper:
            run = hosts.together(lambda: Run(Session(config), directory, NoMetrics(), stopper))
            last = run.store.latest()
            if not last:
                raise InputError(f"{path}: no model beyond M0 to evaluate yet")
            for iteration in range(last):
                run.evaluate(iteration)
            if hosts.first() and (path / "summary.json").exists():
                write_json(path / "summary.json", {"rows": run.rows()})
            return hosts.decide(lambda: [read_json(directory.iteration(t) / "evaluation.json") for t in range(last)])
    finally:
        if hosts.first():
            directory.close()


def _directory(config, reference: str | None) -> dict:
    from scir_jax.engine import hosts
    from scir_jax.loop import console, evaluation, scoring
    from scir_jax.loop.session import Session, check_positive, check_sampling, resolve

    config = resolve(config)
    check_positive(config, "text", "sample", "generative", "evaluate")
    check_sampling(config)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, prompts=None, ift=None, eft=None, pairs=None)
    )
    grader, session = hosts.together(lambda: (evaluation.load_grader(config.evaluate.grader), Session(config)))
    pairs, labels = evaluation.labelled_pairs(session.data.heldout_pairs)
    load_reference = (lambda: session.import_params(Path(reference), inference=True)) if reference else None
    values: dict = {"model": config.model.path}
    total = evaluation.response_batches(session)
    total += scoring.score_batches(session, len(pairs), with_reference=reference is not None)
    session.data.tell_left_out()
    with console.Stopper() as stopper, console.stage("evaluate", total) as bar:
        if pairs:
            scores = scoring.score_pairs(
                session,
                pairs,
                model=session.inference_params,
                reference=load_reference,
                advance=bar.advance,
            )
            values |= evaluation.pair_metrics(session, scores, labels)
        if session.data.heldout_prompts:
            rows = evaluation.evaluate_responses(session, session.inference_params(), 0, stopper, bar)
            values |= evaluation.response_metrics(rows, grader, None)
    return evaluation.clean(values)


if __name__ == "__main__":
    options.main(main)
