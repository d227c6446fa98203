"""python -m scir_jax.sample: responses of a model directory to a file of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scir_jax.config import cli
from scir_jax.config.checks import check_positive, check_sampling, resolve
from scir_jax.config.schema import GenerativeConfig
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
        options={"output": (str, ..., "JSONL file to write, one row per response")},
    )
    from scir_jax.engine.hosts import hosts
    from scir_jax.engine.sampler import stream_key
    from scir_jax.run import auto, console, sampling
    from scir_jax.run.setup import prepare

    config = resolve(config)
    if not config.data.prompts:
        raise InputError("no prompts: give --prompts FILE")
    command.join(config)
    config = auto.settle(config, given, ("text", "devices", "inference"), sections=SECTIONS)
    # No judge is asked here, and the model need not have room for one.
    config = dataclasses.replace(config, generative=GenerativeConfig(templates=()))
    check_positive(config, "sample", "text")
    check_sampling(config)
    output = hosts.together(lambda: cli.output_file(own["output"]))
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
    console.say(f"{len(prompts)} prompts x {config.sample.responses} responses: {output}")
    return 0


if __name__ == "__main__":
    command.main(main)
