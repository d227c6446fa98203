"""The training stages: batches in, a model out, resumable to the bit at any step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.files import read_rows
from scir_jax.data.jsonl import AppendOnly
from scir_jax.data.pairs import Pair, from_row
from scir_jax.data.pipelines import iterator, pair_batches, supervised_batches
from scir_jax.engine.checkpoint import StageCheckpoints
from scir_jax.engine.cost.chips import Chip, of_device
from scir_jax.engine.cost.flops import Work
from scir_jax.engine.hosts import hosts
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.optimizer import learning_rates
from scir_jax.engine.programs import Programs
from scir_jax.engine.trainer import Trainer
from scir_jax.errors import Diverged, InputError
from scir_jax.run import console, costs
from scir_jax.run.constructing import NAME, constructed_rows
from scir_jax.run.costs import Account
from scir_jax.run.directory import RunDirectory
from scir_jax.run.inputs import Inputs
from scir_jax.run.metrics import Metrics
from scir_jax.run.models import Models
from scir_jax.run.places import save as save_files
from scir_jax.run.preflight import check_shapes
from scir_jax.run.watching import PREFIX, Watch, pair_watch

# Columns of metrics.jsonl that no two runs have in common: tokens of the rows, without padding, over all devices; model
# FLOPs (see scir_jax.engine.cost.flops) in 1e12 per second and device, and as a share of the chip's peak.
TIMINGS = ("seconds", "tokens_per_second", "teraflops", "mfu")


def run_sft(
    config: Config,
    encoder: Encoder,
    inputs: Inputs,
    programs: Programs,
    models: Models,
    directory: RunDirectory,
    metrics: Metrics,
    stopper: console.Stopper,
    account: Account,
) -> None:
    """Trains M0 -> M1 on conversations and judge questions; without any, or with sft.epochs 0, M1 is M0.

    Args:
      account: of the stage.
    """
    spec, seed = programs.sft_spec, config.run.seed
    passes = [len(inputs.targets[name]) / group.rows for name, group in spec.targets]
    steps = int(np.ceil(config.sft.epochs * max(passes, default=0)))
    if not steps:
        account.keep()
        models.store.save(1, models.take(0))
        return
    batches = supervised_batches(
        spec,
        encoder,
        inputs.targets,
        steps=steps,
        seeds=target_seeds(seed, 1),
        share=programs.local_rows,
        way=programs.way,
    )
    check_shapes(config, programs, "SFT", batches.shapes, programs.sft_program)
    train_stage(
        config,
        programs.sft,
        "sft",
        directory,
        metrics,
        stopper,
        iteration=0,
        dataset=batches.dataset,
        tokens=batches.tokens,
        peak=config.sft.learning_rate,
        params=lambda: models.take(0),
        frozen=lambda: models.parameters.frozen,
        save=lambda params: models.store.save(1, params),
        watch=pair_watch(config, encoder, inputs, programs, models, 0),
        account=account,
    )


def run_optimise(
    config: Config,
    encoder: Encoder,
    inputs: Inputs,
    programs: Programs,
    models: Models,
    directory: RunDirectory,
    metrics: Metrics,
    stopper: console.Stopper,
    iteration: int,
    account: Account,
) -> None:
    """Trains M_t -> M_{t+1} on the pairs of iteration t beside replayed examples.

    Args:
      account: of the stage.
    """
    folder, seed = directory.iteration(iteration), config.run.seed
    targets = inputs.targets
    if config.judge.constructed_batch_size:
        targets = targets | {"constructed": constructed_rows(encoder, folder / NAME)}
    batches = pair_batches(
        programs.optimise_spec,
        encoder,
        read_pairs(config, folder / "pairs.jsonl"),
        targets,
        epochs=config.optimise.epochs,
        seed=stage_seed(seed, 100 + iteration),
        seeds=target_seeds(seed, 10 + iteration),
        share=programs.local_rows,
        way=programs.way,
    )
    check_shapes(config, programs, f"iteration {iteration}: optimise", batches.shapes, programs.optimise_program)
    train_stage(
        config,
        programs.optimise,
        "optimise",
        directory,
        metrics,
        stopper,
        iteration=iteration,
        dataset=batches.dataset,
        tokens=batches.tokens,
        peak=config.optimise.learning_rate,
        params=lambda: models.take(iteration),
        frozen=lambda: models.parameters.frozen,
        decisions=AppendOnly(folder / "decisions.jsonl") if hosts.first() else None,
        save=lambda params: models.store.save(iteration + 1, params),
        watch=pair_watch(config, encoder, inputs, programs, models, iteration),
        account=account,
    )


def read_pairs(config: Config, path: Path) -> list[Pair]:
    """Reads the pairs of an iteration.

    Raises:
      InputError: a row is bad, or lacks the external label that the method needs.
    """
    external = config.preference.labels == "external"
    # The labels of data.pairs and of pairs.scorer are in the column "label"; else the user adds the column.
    made = config.data.pairs or config.pairs.scorer
    names = config.data.columns.label if external and not made else ("label",)
    pairs = []
    for where, row in read_rows(path):
        pair = from_row(row, where, names)
        if external and pair.label is None:
            raise InputError(
                f"{where}: lacks the external label {names[0]!r} (1 where response_a is better, 0 where response_b is)"
                "; add it to every row and run the same command again"
            )
        pairs.append(pair)
    return pairs


def stage_seed(seed: int, stream: int) -> int:
    """Returns the seed of one use of shuffling."""
    return int(np.random.SeedSequence([seed, 2, stream]).generate_state(1)[0])


def target_seeds(seed: int, stream: int) -> dict[str, int]:
    """Returns the seeds of the shuffling of supervised rows."""
    streams = {"ift": stream, "eft": stream + 1000, "constructed": stream + 2000}
    return {name: stage_seed(seed, number) for name, number in streams.items()}


def train_stage(
    config: Config,
    trainer: Trainer,
    stage: str,
    directory: RunDirectory,
    metrics: Metrics,
    stopper: console.Stopper,
    *,
    iteration: int,
    dataset: grain.MapDataset,
    peak: float,
    params: Callable[[], Any],
    frozen: Callable[[], Any],
    decisions: AppendOnly | None = None,
    save: Callable[[Any], None],
    watch: Watch | None = None,
    tokens: Callable[[int], dict[str, int]] = lambda number: {},
    account: Account | None = None,
) -> None:
    """Trains over `dataset` once and saves the resulting parameters; goes on from the newest checkpoint if any.

    Args:
      config: its sections run, training, checkpoint and evaluate.
      stage: its name in metrics.jsonl, "sft" or "optimise".
      iteration: 0 for SFT.
      peak: of the learning rate.
      params: gives the trained parameters to start from, which are donated.
      frozen: gives those that stay as they are.
      decisions: file of the decisions about each pair in every step.
      save: is given the final trained parameters.
      watch: evaluates the trained parameters every evaluate.every steps; what it says stands in the step's row.
      tokens: number of a step -> tokens of its rows by part, as in scir_jax.data.pipelines.Batches.
      account: of the stage, which adds up the rows of all its steps, of processes before this one too.

    Raises:
      Diverged: after training.max_skipped steps in a row with a non-finite loss or gradient.
      Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    mesh, title = trainer.mesh, f"iteration {iteration}: optimise" if iteration else "SFT"
    steps = len(dataset)
    rates = learning_rates(config.training, peak, steps)
    checkpoints = StageCheckpoints(directory.stage_checkpoints(iteration), config.checkpoint.keep)
    restored = checkpoints.restore(trainer.abstract_state())
    if restored is None:
        done, state, position = 0, trainer.init(params()), None
    else:
        done, state, meta = restored
        position = meta["data"]
    rest = frozen()
    batches = iterator(dataset, position)
    metrics.start_stage(stage, iteration, done)
    if decisions is not None:
        decisions.cut(lambda row: row["step"] <= done)

    def written() -> dict[str, str]:
        """What stands in the files that grow with each step."""
        return {"metrics": metrics.sha256(), "decisions": decisions.sha256() if decisions is not None else ""}

    if restored is not None:
        hosts.decide(lambda: _check_written(directory, iteration, written(), meta["written"]))

    speed = Speed(trainer.step_flops, mesh.size, of_device(mesh.devices.flat[0].device_kind))
    # An accelerator runs ahead of the host; on a CPU a second step in flight would hold a second step's buffers.
    waits = mesh.devices.flat[0].platform == "cpu"
    skipped = min(config.training.max_skipped, steps)
    writer = _Writer(metrics, decisions, stage, iteration, skipped, speed, tokens)
    try:
        with console.stage(title, steps, done, "compiling") as bar:
            for step in range(done, steps):
                batch = put_batch(next(batches), mesh)
                started = time.monotonic()
                key = trainer.dropout_key(config.run.seed, iteration, step)
                state, output = trainer.step(state, rest, batch, rates[step], key)
                completed = step + 1
                looks = watch is not None and completed % config.evaluate.every == 0 and completed < steps
                # The output is read one step late, so that the host never waits for an accelerator.
                writer.flush()
                writer.hold(completed, output, started)
                if looks:
                    writer.flush(more=lambda: watch.look(state.params))
                elif waits:
                    writer.flush()
                bar.advance(writer.note)
                stop = stopper.vote()
                if completed < steps and (stop or completed % config.checkpoint.every == 0):
                    writer.flush(sync=True)
                    save_files(directory.path)
                    checkpoints.save(completed, state, {"data": batches.get_state(), "written": written()})
                if stop and completed < steps:
                    checkpoints.wait()
                    stopper.stop(title)
            writer.flush(sync=True)
        if account is not None:
            _settle(account, metrics.stage(stage, iteration), watch)
        # With its model the stage is done, and what it wrote is not written again.
        save_files(directory.path)
        save(state.params)
        jax.block_until_ready(state)
    except BaseException:
        # What went wrong first is what the user must read.
        with contextlib.suppress(Exception):
            checkpoints.close()
        raise
    finally:
        if decisions is not None:
            decisions.close()
    checkpoints.remove()


def _settle(account: Account, rows: Sequence[Mapping[str, Any]], watch: Watch | None) -> None:
    """Adds up the rows of a stage, with the looks that were taken within it."""
    account.add(costs.of_steps(rows))
    if watch is not None:
        looks = sum(any(name.startswith(PREFIX) for name in row) for row in rows)
        account.add(watch.once + watch.each * looks)
    account.keep()


def _check_written(directory: RunDirectory, iteration: int, found: dict[str, str], expected: dict[str, str]) -> None:
    paths = {
        "metrics": directory.path / "metrics.jsonl",
        "decisions": directory.iteration(iteration) / "decisions.jsonl",
    }
    for name, path in paths.items():
        if found[name] != expected[name]:
            raise InputError(
                f"{path}: its rows up to the last checkpoint are not those that the run wrote; restore it, or remove "
                f"{directory.stage_checkpoints(iteration)}, and the stage begins again"
            )


class Speed(NamedTuple):
    """How fast steps are.

    Attributes:
      flops: gives the model FLOPs of a step over all devices.
      devices: their number.
      chip: None where its peak is not known.
    """

    flops: Callable[[Work], int]
    devices: int
    chip: Chip | None

    def of(self, work: Work, seconds: float) -> dict[str, float]:
        """Returns the columns TIMINGS of a step; "mfu" where there is a chip."""
        seconds_ = max(seconds, 1e-9)
        rate = self.flops(work) / self.devices / seconds_
        values = {"seconds": seconds, "tokens_per_second": float(work.tokens) / seconds_, "teraflops": rate / 1e12}
        return values if self.chip is None else values | {"mfu": rate / self.chip.flops}


class _Writer:
    """Holds the last step's output until the next step is under way."""

    def __init__(
        self,
        metrics: Metrics,
        decisions: AppendOnly | None,
        stage: str,
        iteration: int,
        max_skipped: int,
        speed: Speed,
        tokens: Callable[[int], dict[str, int]],
    ):
        self._speed, self._tokens = speed, tokens
        self._metrics, self._decisions = metrics, decisions
        self._stage, self._iteration = stage, iteration
        self._max_skipped = max_skipped
        self._held: tuple | None = None
        self._last = time.monotonic()
        self.note = ""

    def hold(self, step: int, output, started: float) -> None:
        self._held = (step, output, started)

    def flush(self, *, sync: bool = False, more: Callable[[], dict[str, float]] | None = None) -> None:
        if self._held is not None:
            (step, output, started), self._held = self._held, None
            values = {k: float(v) for k, v in jax.device_get(output.metrics).items()}
            now = time.monotonic()
            seconds, self._last = now - max(started, self._last), now
            in_a_row = int(values.pop("skipped_in_a_row"))
            work = jax.device_get(output.work)
            values |= {f"tokens/{part}": count for part, count in self._tokens(step - 1).items()}
            values["flops"] = self._speed.flops(work)
            values |= self._speed.of(work, seconds)
            if more is not None:
                values |= more()
                self._last = time.monotonic()  # no part of the next step's time
            self._metrics.write(self._stage, self._iteration, step, values)
            if self._decisions is not None:
                self._write_decisions(step, jax.device_get(output.decisions))
            self.note = f"loss {values['loss']:.3f}, {values['tokens_per_second']:,.0f} tokens/s"
            self.note += f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
            if in_a_row >= self._max_skipped:
                self._metrics.sync()
                raise Diverged(
                    f"{in_a_row} steps in a row had a non-finite loss or gradient (up to step {step} of {self._stage}, "
                    "none of them changed the model); the last checkpoint is intact: lower the learning rate or look "
                    "at the data, in a new run.directory"
                )
        if sync:
            self._metrics.sync()
            if self._decisions is not None:
                self._decisions.sync()

    def _write_decisions(self, step: int, decided: dict[str, np.ndarray]) -> None:
        # In the order of the batch, whatever the mesh.
        pairs = decided.pop("pair")
        for i in np.argsort(decided.pop("place"), kind="stable"):
            if (pair := pairs[i]) >= 0:
                row = {name: values[i].tolist() for name, values in decided.items()}
                self._decisions.write({"step": step, "pair": int(pair), **row})
