"""python -m scir_jax.sample: responses of a model directory to a file of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from scir_jax.config import cli
from scir_jax.config.checks import check_positive, check_sampling, resolve
from scir_jax.config.schema import Config, DataConfig, GenerativeConfig
from scir_jax.errors import InputError
from scir_jax.run import command

SECTIONS = ("run", "world", "model", "lora", "mesh", "data", "text", "sample")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    config, own, given = cli.line(
        "sample",
        __doc__,
        argv,
        sections=SECTIONS,
        options={
            "output": (str, ..., "JSONL file to write, one row per response"),
            "format": (
                Literal["rows", "alpaca_eval", "mt_bench"],
                "rows",
                "alpaca_eval: write model_outputs.json; mt_bench: the prompts are MT-Bench's questions, which are "
                "answered turn by turn, and its answers are written",
            ),
            "generator": (str | None, None, "name of the model in such a file, by default its directory's"),
        },
    )
    from scir_jax.data.files import read_rows
    from scir_jax.data.jsonl import write_json
    from scir_jax.engine.hosts import hosts
    from scir_jax.engine.sampler import stream_key
    from scir_jax.evaluation import outputs
    from scir_jax.run import auto, console, sampling
    from scir_jax.run.setup import prepare

    config = resolve(config)
    if not config.data.prompts:
        raise InputError("no prompts: give --prompts FILE")
    command.join(config)
    generator = own["generator"] or Path(config.model.path).name
    if own["format"] == "mt_bench":
        return _mt_bench(config, own["output"], generator, given)
    if own["format"] == "alpaca_eval":
        if "sample.responses" not in given:
            config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, responses=1))
        if config.sample.responses != 1:
            raise InputError("--format alpaca_eval has one response per prompt: set sample.responses to 1")
    config = auto.settle(config, given, ("text", "devices", "inference"), sections=SECTIONS)
    # No judge is asked here, and the model need not have room for one.
    config = dataclasses.replace(config, generative=GenerativeConfig(templates=()))
    check_positive(config, "sample", "text")
    check_sampling(config)
    output = hosts.together(lambda: cli.output_file(own["output"]))
    place = output
    if own["format"] == "alpaca_eval":
        output = output.with_name(f"{output.name}.rows")
    hosts.shares(output.parent)
    if hosts.first():
        # An interrupted command, perhaps one with other settings, left these.
        for part in sampling.parts(output):
            part.unlink()
    count = config.sample.prompts
    encoder, inputs, programs, parameters = hosts.together(
        lambda: prepare(config, lambda encoder, inputs: encoder.lengths(inputs.prompts[:count]))
    )
    prompts = inputs.prompts[:count]
    inputs.tell_left_out()
    params = parameters.configured()
    with console.Stopper() as stopper:
        sampling.sample_file(
            encoder,
            programs,
            params,
            list(enumerate(prompts)),
            output,
            responses=config.sample.responses,
            sampling=sampling.settings_of(config.sample),
            key=stream_key(config.run.seed, "responses", 0),
            title="sample",
            stopper=stopper,
            resumable=False,
        )
    if place != output and hosts.first():
        rows = [row for _, row in read_rows(output)]
        write_json(place, outputs.output_rows(rows, generator, Path(config.data.prompts).stem))
        output.unlink()
    console.say(f"{len(prompts)} prompts x {config.sample.responses} responses: {place}")
    return 0


def _mt_bench(config: Config, output: str, generator: str, given: Collection[str]) -> int:
    """Answers MT-Bench's questions."""
    from scir_jax.data.jsonl import write_rows
    from scir_jax.engine.hosts import hosts
    from scir_jax.evaluation.outputs import read_questions
    from scir_jax.run import auto, console, mt_bench
    from scir_jax.run.loaded import of_config

    questions = hosts.together(lambda: read_questions(str(config.data.prompts)))
    place = hosts.together(lambda: cli.output_file(output))
    config = dataclasses.replace(config, data=DataConfig(columns=config.data.columns))
    config = auto.settle(config, given, ("devices", "inference"), sections=SECTIONS)
    if "sample.responses" not in given:
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, responses=1))
    if "text.max_prompt_tokens" not in given:
        config = mt_bench.with_room(config, questions)
    rows = mt_bench.answers(of_config(config), questions, generator)
    if hosts.first():
        write_rows(place, rows)
    console.say(f"{len(rows)} questions x {config.sample.responses} answers: {place}")
    return 0


if __name__ == "__main__":
    command.main(main)
