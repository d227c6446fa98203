"""python -m scir_jax.export: a checkpoint of a run to a Hugging Face directory that transformers loads."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from scir_jax.bucket.outputs import output
from scir_jax.bucket.working import place
from scir_jax.config.names import run_directory
from scir_jax.config.schema import GenerativeConfig
from scir_jax.errors import InputError
from scir_jax.run import command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m scir_jax.export", description=__doc__)
    parser.add_argument("run", help="run directory, or NAME for runs/NAME")
    parser.add_argument("output", help="directory to write")
    parser.add_argument(
        "--model", help="M0, M1, ...; by default a finished run's best (evaluate.select), else the newest"
    )
    parser.add_argument("--adapter", action="store_true", help="write a LoRA run's adapters alone, as a PEFT directory")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face hub too (hf auth login)")
    parser.add_argument("--private", action="store_true", help="with --push: a model that is new there is private")
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes, one per host")
    arguments = parser.parse_args(argv)

    from scir_jax.data.pairs import Prompt
    from scir_jax.engine import mesh
    from scir_jax.engine.checkpoint import ModelStore
    from scir_jax.engine.hosts import hosts
    from scir_jax.run import console
    from scir_jax.run.card import write_card
    from scir_jax.run.directory import RunDirectory, settings_of
    from scir_jax.run.export import export_adapter, export_model
    from scir_jax.run.push import check_name, push
    from scir_jax.run.setup import prepare

    if arguments.push:
        check_name(arguments.push)
    arguments.run = place(run_directory(str(arguments.run)))
    arguments.output = output(arguments.output)
    config = settings_of(arguments.run, arguments.distributed)
    command.join(config)
    config = dataclasses.replace(config, mesh=mesh.fitting(config.mesh))
    directory = RunDirectory(arguments.run)
    name = arguments.model or directory.best or f"M{ModelStore(directory.checkpoints).latest() or 0}"
    if not name.removeprefix("M").isdigit():
        raise InputError(f"--model {name}: expected M0, M1, ...")
    export = export_adapter if arguments.adapter else export_model
    hosts.together(lambda: directory.keep_models(config))
    hosts.decide(lambda: directory.check_models(config))
    # Neither data nor judge templates need be there.
    alone = dataclasses.replace(config, generative=GenerativeConfig(templates=()))
    prompt = Prompt([], (0,), (0,))
    programs = hosts.together(lambda: prepare(alone, lambda encoder, _: encoder.lengths([prompt]))).programs
    number = int(name.removeprefix("M"))
    export(config, programs, directory, number, arguments.output)
    hosts.decide(lambda: write_card(arguments.output, config, directory, number, arguments.push))
    console.say(f"{name} of {arguments.run}: {arguments.output}")
    if arguments.push:
        console.say(hosts.decide(lambda: push(arguments.output, arguments.push, private=arguments.private)))
    return 0


if __name__ == "__main__":
    command.main(main)
