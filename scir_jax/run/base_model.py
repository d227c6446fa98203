"""The embedded world's base model M0: trained once on the world's documents with the ordinary supervised step."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from filelock import FileLock

from scir_jax.config.schema import (
    Config,
    DataConfig,
    GenerativeConfig,
    LoraConfig,
    ModelConfig,
    SFTConfig,
    TrainingConfig,
    WorldConfig,
)
from scir_jax.data.pipelines import iterator, supervised_batches
from scir_jax.engine.hosts import hosts
from scir_jax.engine.mesh import check_batches, make_mesh, put_batch
from scir_jax.engine.optimizer import learning_rates
from scir_jax.engine.sampler import stream_key
from scir_jax.errors import InputError
from scir_jax.model.hf import weights
from scir_jax.run import console
from scir_jax.run.setup import prepare
from scir_jax.world import base
from scir_jax.world.files import WorldSpec, write_world

OPTIMIZER: Literal["muon"] = "muon"
"""comes in half of the steps as far as AdamW"""


def spec_of(world: WorldConfig) -> WorldSpec:
    """Returns the specification of the configured world.

    Raises:
      InputError: the size of the model is none that there can be.
    """
    size = world.hidden_size
    if size < 32 or size % 32 or world.layers < 1:
        raise InputError(
            f"world.hidden_size is {size} and world.layers {world.layers}; take a multiple of 32, and one layer or more"
        )
    return WorldSpec(
        seed=world.seed,
        hidden_size=size,
        layers=world.layers,
        heads=size // 16,
        key_value_heads=size // 32,
        intermediate_size=5 * size // 2,
    )


def training_of(world: WorldConfig) -> dict[str, Any]:
    """Returns what decides how the base model is trained, by name."""
    settings = {name: getattr(world, name) for name in ("steps", "documents", "comparisons", "learning_rate")}
    return {"optimizer": OPTIMIZER, **settings}


def build_world(config: Config, stopper: console.Stopper, *, retrain: bool = False) -> None:
    """Writes the world's files and its base model under world.directory, unless they are there.

    The result is a Hugging Face directory and JSONL files like any user's. The base model is the one that travels with
    the package where that is the configured one; any other is trained. Interrupted, that starts again: it is a
    minute's work.

    Args:
      retrain: train the base model though the package holds it; the directory must hold none.

    Raises:
      InputError: the directory holds something else, or the package's weights were changed.
    """
    directory = Path(config.world.directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Two runs may share a world: the second waits for the first to make it.
    lock = FileLock(directory.with_name(directory.name + ".lock"))
    with lock if hosts.first() else contextlib.nullcontext():

        def write() -> bool:
            spec = spec_of(config.world)
            write_world(directory, spec)
            if retrain and (directory / "model").is_dir():
                raise InputError(f"{directory} holds a base model already; name another world.directory")
            if not (directory / "model").is_dir() and not retrain:
                if weights_file := base.shipped(spec, training_of(config.world)):
                    _copy(directory, weights_file)
            return (directory / "model").is_dir()

        if not hosts.decide(write):
            _train(config, directory, stopper)


def _copy(directory: Path, weights_file: Path) -> None:
    """Makes the model's directory of weights that were trained before."""
    source, partial = directory / "untrained", directory / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.copyfile(weights_file, partial / base.WEIGHTS)
    arch, params = weights.load(partial)
    # Written as a trained one is, so that nothing tells them apart.
    weights.save(partial, arch, params, config=weights.hf_config(source), source=source)
    partial.replace(directory / "model")


def _train(config: Config, directory: Path, stopper: console.Stopper) -> None:
    world, source = config.world, directory / "untrained"
    config = dataclasses.replace(
        config,
        model=ModelConfig(path=str(source)),
        data=DataConfig(
            ift=str(directory / "base.jsonl"),
            eft=str(directory / "base_comparisons.jsonl"),
            prompts=str(directory / "prompts.jsonl"),
        ),
        generative=GenerativeConfig(
            templates=(str(directory / "judge.yaml"), str(directory / "judge_continuation.yaml"))
        ),
        # Hundreds of steps are worth a few more compilations.
        text=dataclasses.replace(config.text, packing="lengths", share_prompts="auto"),
        sft=SFTConfig(ift_batch_size=world.documents, eft_batch_size=world.comparisons),
        training=TrainingConfig(optimizer=OPTIMIZER, warmup=0.05),
        lora=LoraConfig(),
    )
    sizes = {f"world.{key}": (getattr(world, key), 1) for key in ("documents", "comparisons")}
    check_batches(make_mesh(config.mesh), sizes)
    encoder, inputs, programs, _ = hosts.together(lambda: prepare(config))
    standalone, continuation = encoder.judges
    # Most questions have the layout of the quickstart, and enough have the other one that SFT can teach it.
    judged = [(standalone, inputs.eft), (continuation, inputs.eft[: len(inputs.eft) // 4])]
    questions = [row for judge, pairs in judged for pair in pairs for row in encoder.verdict_rows(judge, pair)]
    seed = int(np.random.SeedSequence([world.seed, 3]).generate_state(1)[0])
    batches = supervised_batches(
        programs.sft_spec,
        encoder,
        {"ift": inputs.targets["ift"], "eft": questions},
        steps=world.steps,
        seeds={"ift": seed, "eft": seed + 1},
        share=programs.local_rows,
        way=programs.way,
    )
    trainer = programs.sft
    init = jax.jit(programs.model.init, out_shardings=trainer.state_shardings.params)
    state = trainer.init(init(stream_key(world.seed, "world", 0)))
    rates = learning_rates(config.training, world.learning_rate, world.steps)
    with console.stage("embedded world: base model", world.steps) as bar:
        for step, batch in enumerate(iterator(batches.dataset)):
            if stopper.vote():
                stopper.stop("the base model's training, which starts again")
            state, output = trainer.step(state, {}, put_batch(batch, programs.mesh), rates[step], None)
            if step % 20 == 0:
                bar.advance(f"loss {float(output.metrics['loss']):.3f}", by=min(20, world.steps - step))
    partial = directory / "model.partial"
    hf_config = weights.hf_config(source)
    weights.save(partial, programs.arch, state.params, config=hf_config, source=source, writer=hosts.first())
    if hosts.first():
        partial.replace(directory / "model")
    hosts.barrier("base model")
