"""python -m scir_jax.compare: win rate and length-controlled win rate of one model's answers against another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scir_jax.config import cli
from scir_jax.config.checks import check_positive, resolve
from scir_jax.config.schema import Config, DataConfig
from scir_jax.errors import InputError
from scir_jax.run import command

if TYPE_CHECKING:
    from scir_jax.evaluation.outputs import Compared

SECTIONS = ("run", "world", "model", "lora", "mesh", "data", "text", "generative", "implicit", "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    config, own, given = cli.line(
        "compare",
        __doc__,
        argv,
        sections=SECTIONS,
        options={
            "outputs": (
                str | None,
                None,
                "the model's answers: rows of prompt and response (or instruction and output), or MT-Bench's answers",
            ),
            "baseline": (str | None, None, "the other model's answers to the same prompts"),
            "judge": (
                str,
                ...,
                "who prefers an answer: a model directory, a grader module:function, or a file of annotations, which "
                "needs no answers",
            ),
            "questions": (str | None, None, "MT-Bench's questions, where the answers are MT-Bench's"),
            "gamed": (str | None, None, "AlpacaEval's df_gamed.csv: its whole regression, for its own instructions"),
            "names": (
                tuple[str, str] | None,
                None,
                "names of the model and of the baseline, where their files give none",
            ),
            "annotations": (str | None, None, "annotations.json to write, a preference from 1 to 2 for every pair"),
            "output": (str | None, None, "JSON file to write: the win rates"),
        },
    )
    from scir_jax.data.jsonl import write_json
    from scir_jax.engine.hosts import hosts
    from scir_jax.evaluation import outputs, win_rates
    from scir_jax.run import comparing, console, evaluation, hub

    judge = own["judge"]
    annotated = Path(judge).is_file()
    if not annotated and not (own["outputs"] and own["baseline"]):
        raise InputError(
            f"give --outputs and --baseline, the files of both models' answers: --judge {judge} is no file of annotations"
        )
    config = dataclasses.replace(config, data=DataConfig(columns=config.data.columns))
    function = hub.is_function(judge)
    if not annotated and not function:
        config = resolve(dataclasses.replace(config, model=dataclasses.replace(config.model, path=judge)))
    command.join(config)
    files = [
        hosts.together(lambda: cli.output_file(own[name])) if own[name] else None for name in ("output", "annotations")
    ]
    gamed = hosts.together(lambda: outputs.read_gamed(own["gamed"])) if own["gamed"] else None
    if gamed is not None:
        win_rates.needs_sklearn()

    def read() -> list[Compared]:
        if annotated:
            return outputs.read_annotations(judge)
        columns, questions = config.data.columns, own["questions"]
        both = [outputs.read_outputs(own[name], columns, questions) for name in ("baseline", "outputs")]
        return outputs.match(both[0], both[1], (own["baseline"], own["outputs"]))

    compared = hosts.together(read)
    compared = outputs.named(compared, own["names"] or (own["outputs"], own["baseline"]))
    if not annotated:
        if function:
            preferences = hosts.together(lambda: comparing.grade(compared, evaluation.load_grader(judge)))
        else:
            preferences = _judged(config, given, compared)
        compared = [pair._replace(preference=float(p)) for pair, p in zip(compared, preferences, strict=True)]
    if not hosts.first():
        return 0
    values = {"judge": judge, **comparing.results(compared, gamed=gamed, tell=console.say)}
    output, annotations = files
    if annotations:
        write_json(annotations, outputs.annotation_rows(compared, judge))
    if output:
        write_json(output, values)
    print(comparing.table(values))
    return 0


def _judged(config: Config, given: Collection[str], compared: Sequence[Compared]) -> Sequence[float]:
    """Asks the model directory `model.path`; a pair whose prompt is left out has no preference."""
    import numpy as np

    from scir_jax.data import statistics
    from scir_jax.data.records import Comparison
    from scir_jax.data.tally import Tally
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import auto, comparing, console
    from scir_jax.run.setup import prepare

    if not config.world.directory and "run.auto" not in given:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, auto=True))
    texts = [Comparison(model.messages, baseline.text, model.text, None) for baseline, model, _ in compared]
    kinds = ("text", "devices", "inference")
    config = auto.settle(config, {*given, "model.path"}, kinds, sections=SECTIONS, pairs=texts)
    check_positive(config, "text", "generative", "evaluate")
    tally = Tally("outputs")
    pairs, places = [], []

    def read(encoder, _):
        found = comparing.pairs_of(encoder, compared, tally)
        pairs.extend(found[0])
        places.extend(found[1])
        return encoder.lengths([pair.prompt for pair in pairs])

    encoder, _, programs, parameters = hosts.together(lambda: prepare(config, read))
    for sentence in statistics.left_out({"outputs": tally}):
        console.say(sentence)
    if short := sum(answer.cut for pair in pairs for answer in pair.answers):
        console.say(
            f"{short} of {2 * len(pairs)} answers are longer than text.max_response_tokens; the judge sees their beginning"
        )
    preferences = np.full(len(compared), np.nan)
    with console.Stopper() as stopper, console.stage("judge", len(pairs)) as bar:

        def advance(by: int) -> None:
            bar.advance(by=by)
            stopper.check("comparison", resumable=False)

        params = parameters.configured()
        preferences[places] = comparing.judge(config, encoder, programs, params, pairs, advance)
    return preferences


if __name__ == "__main__":
    command.main(main)
