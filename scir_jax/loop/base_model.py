"""The embedded world's base model M0: trained once on the world's documents with the ordinary supervised step."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
from filelock import FileLock

from scir_jax.config import (
    Config,
    DataConfig,
    GenerativeConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
)
from scir_jax.data import pipelines
from scir_jax.engine import hosts
from scir_jax.engine.mesh import check_batches, put_batch
from scir_jax.engine.sampler import stream_key
from scir_jax.engine.steps import learning_rates
from scir_jax.loop import console
from scir_jax.loop.session import Session
from scir_jax.model import weights
from scir_jax.world.files import WorldSpec, write_world


def build_world(config: Config, stopper: console.Stopper) -> None:
    """Writes the world's files and its trained base model under world.directory, unless they are there.

    The result is a Hugging Face directory and JSONL files like any user's. Interrupted, it starts again: it is a
    minute's work.
    """
    directory = Path(config.world.directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Two runs may share a world: the second waits for the first to make it.
    lock = FileLock(directory.with_name(directory.name + ".lock"))
    with lock if hosts.first() else contextlib.nullcontext():

        def write() -> bool:
            write_world(directory, WorldSpec(seed=config.world.seed))
            return (directory / "model").is_dir()

        if not hosts.decide(write):
            _train(config, directory, stopper)


def _train(config: Config, directory: Path, stopper: console.Stopper) -> None:
    world = config.world
    config = dataclasses.replace(
        config,
        model=ModelConfig(path=str(directory / "untrained")),
        data=DataConfig(
            ift=str(directory / "base.jsonl"),
            eft=str(directory / "base_comparisons.jsonl"),
            prompts=str(directory / "prompts.jsonl"),
        ),
        generative=GenerativeConfig(
            templates=(str(directory / "judge.yaml"), str(directory / "judge_continuation.yaml"))
        ),
        optimizer=OptimizerConfig(warmup=0.05),
        lora=LoraConfig(),
    )
    session = hosts.together(lambda: Session(config))
    check_batches(session.mesh, {"world.documents": (world.documents, 1), "world.comparisons": (world.comparisons, 1)})
    standalone, continuation = session.judges
    # Mostly the layout of the quickstart, and enough of the other that SFT can teach it.
    eft = session.data.eft
    judged = [(standalone, eft), (continuation, eft[: len(eft) // 4])]
    judge_rows = [row for judge, pairs in judged for pair in pairs for row in session.encoder.verdict_rows(judge, pair)]
    seed = int(np.random.SeedSequence([world.seed, 3]).generate_state(1)[0])
    pad_id = session.chat.pad_id

    def batches(rows, tokens: int, size: int, stream: int):
        return pipelines.targets_dataset(rows, tokens, size, pad_id, stream, session.local_rows)

    dataset = pipelines.sft_dataset(
        batches(session.data.ift_rows, session.shapes.ift, world.documents, seed),
        batches(judge_rows, session.shapes.eft, world.comparisons, seed + 1),
        world.steps,
    )
    trainer = session.trainer
    init = jax.jit(session.model.init, out_shardings=trainer.state_shardings.params)
    state = trainer.init(init(stream_key(world.seed, "world", 0)))
    rates = learning_rates(session.config.optimizer, world.learning_rate, world.steps)
    output = None
    with console.stage("embedded world: base model", world.steps) as bar:
        for step, batch in enumerate(pipelines.iterator(dataset)):
            if stopper.asked():
                stopper.stop("the base model's training, which starts again")
            state, output = trainer.step(state, {}, put_batch(batch, session.mesh), rates[step], None)
            if step % 20 == 0:
                bar.advance(f"loss {float(output.metrics['loss']):.3f}", by=min(20, world.steps - step))
    partial = directory / "model.partial"
    weights.save(
        partial,
        session.arch,
        state.params,
        config=session.hf_config,
        source=directory / "untrained",
        writer=hosts.first(),
    )
    if hosts.first():
        partial.replace(directory / "model")
    hosts.barrier("base model")
