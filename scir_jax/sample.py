"""python -m scir_jax.sample: responses of a model directory to a file of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scir_jax import options
from scir_jax.config import GenerativeConfig

SECTIONS = ("run", "world", "model", "lora", "mesh", "data", "text", "sample")


def main(argv: Sequence[str] | None = None) -> int:
    config, own = options.parse(
        "sample",
        __doc__,
        argv,
        sections=SECTIONS,
        options={"output": (str, ..., "JSONL file to write, a row a response")},
    )
    from scir_jax.engine import hosts
    from scir_jax.engine.sampler import Sampling, stream_key
    from scir_jax.errors import InputError
    from scir_jax.loop import console, sampling
    from scir_jax.loop.session import Session, check_positive, check_sampling, resolve

    # No judge is asked here, and the model need not have room for one.
    config = resolve(dataclasses.replace(config, generative=GenerativeConfig(templates=())))
    check_positive(config, "sample", "text")
    check_sampling(config)
    if not config.data.prompts:
        raise InputError("no prompts: give --data.prompts FILE")
    options.join(config)
    output = hosts.together(lambda: options.output_file(own["output"]))
    hosts.shares(output.parent)
    if hosts.first():
        # Left by an interrupted command, perhaps of other settings.
        for part in sampling.parts(output):
            part.unlink()
    session = hosts.together(lambda: Session(config))
    prompts = session.data.prompts[: config.sample.prompts]
    session.data.shapes_for(prompts)
    session.data.tell_left_out()
    params = session.inference_params()
    with console.Stopper() as stopper:
        sampling.sample_file(
            session,
            params,
            list(enumerate(prompts)),
            output,
            responses=config.sample.responses,
            sampling=Sampling.of(config.sample.temperature, config.sample.top_p, config.sample.top_k),
            key=stream_key(config.run.seed, "responses", 0),
            title="sample",
            stopper=stopper,
            resumable=False,
        )
    console.say(f"{len(prompts)} prompts x {config.sample.responses} responses: {output}")
    return 0


if __name__ == "__main__":
    options.main(main)
