"""One training stage: batches in, a model out, resumable to the bit at any step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from scir_jax.data.pipelines import iterator
from scir_jax.engine.checkpoint import StageCheckpoints
from scir_jax.engine.chips import Chip, of_device
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.metrics import AppendOnly, Metrics
from scir_jax.engine.steps import learning_rates
from scir_jax.errors import InputError
from scir_jax.loop import console
from scir_jax.loop.directory import RunDirectory
from scir_jax.loop.session import Session

# Columns of metrics.jsonl that no two runs have in common: tokens with padding over all devices; model FLOPs (see
# scir_jax.engine.flops) in 1e12/s and device, and as a share of the chip's peak.
TIMINGS = ("seconds", "tokens_per_second", "teraflops", "mfu")


def train_stage(
    session: Session,
    run: RunDirectory,
    metrics: Metrics,
    stopper: console.Stopper,
    *,
    name: str,
    stage: str,
    iteration: int,
    title: str,
    dataset: grain.MapDataset,
    peak: float,
    flops: int,
    params: Callable[[], Any],
    frozen: Callable[[], Any],
    decisions: AppendOnly | None = None,
    save: Callable[[Any], None],
) -> None:
    """Trains over `dataset` once and saves the resulting parameters; goes on from the newest checkpoint if any.

    Args:
      name: of the stage's checkpoint directory.
      flops: model FLOPs of a step over all devices.
      params: gives the trained parameters to start from, which are donated.
      frozen: gives those that stay as they are.
      decisions: file of the per-pair decisions of every step.
      save: is given the final trained parameters.

    Raises:
      InputError: after optimizer.max_skipped steps in a row with a non-finite loss or gradient.
      Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
    """
    config = session.config
    trainer = session.trainer
    steps = len(dataset)
    rates = learning_rates(config.optimizer, peak, steps)
    checkpoints = StageCheckpoints(run.checkpoints / name, config.checkpoint.keep)
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

    speed = Speed(flops / session.mesh.size, of_device(session.mesh.devices.flat[0].device_kind))
    writer = _Writer(metrics, decisions, stage, iteration, min(config.optimizer.max_skipped, steps), speed)
    try:
        with console.stage(title, steps, done, "compiling") as bar:
            for step in range(done, steps):
                batch = put_batch(next(batches), session.mesh)
                started = time.monotonic()
                key = trainer.dropout_key(iteration, step)
                state, output = trainer.step(state, rest, batch, rates[step], key)
                # Read one step late: the device is never waited for.
                writer.flush()
                writer.hold(step + 1, output, _tokens(batch), started)
                bar.advance(writer.note)
                completed = step + 1
                stop = stopper.asked()
                if completed < steps and (stop or completed % config.checkpoint.every == 0):
                    writer.flush(sync=True)
                    checkpoints.save(completed, state, {"data": batches.get_state()})
                if stop and completed < steps:
                    checkpoints.wait()
                    stopper.stop(title)
            writer.flush(sync=True)
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


class Speed(NamedTuple):
    """flops: model FLOPs of a step and device; chip: None where its peak is not known."""

    flops: float
    chip: Chip | None

    def of(self, tokens: int, seconds: float) -> dict[str, float]:
        """The columns TIMINGS of a step; "mfu" where there is a chip."""
        rate = self.flops / max(seconds, 1e-9)
        values = {"seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9), "teraflops": rate / 1e12}
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
    ):
        self._speed = speed
        self._metrics, self._decisions = metrics, decisions
        self._stage, self._iteration = stage, iteration
        self._max_skipped = max_skipped
        self._held: tuple | None = None
        self._last = time.monotonic()
        self.note = ""

    def hold(self, step: int, output, tokens: int, started: float) -> None:
        self._held = (step, output, tokens, started)

    def flush(self, *, sync: bool = False) -> None:
        if self._held is not None:
            (step, output, tokens, started), self._held = self._held, None
            values = {k: float(v) for k, v in jax.device_get(output.metrics).items()}
            now = time.monotonic()
            seconds, self._last = now - max(started, self._last), now
            in_a_row = int(values.pop("skipped_in_a_row"))
            values |= self._speed.of(tokens, seconds)
            self._metrics.write(self._stage, self._iteration, step, values)
            if self._decisions is not None:
                self._write_decisions(step, jax.device_get(output.decisions))
            self.note = f"loss {values['loss']:.3f}" + (f", MFU {values['mfu']:.1%}" if "mfu" in values else "")
            if in_a_row >= self._max_skipped:
                self._metrics.sync()
                raise InputError(
                    f"{in_a_row} steps in a row had a non-finite loss or gradient (up to step {step} of {self._stage}, "
                    "none of them changed the model); the last checkpoint is intact: lower the learning rate or look "
                    "at the data, in a new run.directory"
                )
        if sync:
            self._metrics.sync()
            if self._decisions is not None:
                self._decisions.sync()

    def _write_decisions(self, step: int, decided: dict[str, np.ndarray]) -> None:
        for i, pair in enumerate(decided.pop("pair")):
            if pair >= 0:
                row = {name: values[i].tolist() for name, values in decided.items()}
                self._decisions.write({"step": step, "pair": int(pair), **row})


def _tokens(batch) -> int:
    """Token places of a batch, padding included: what the device works on."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return sum(x.size for path, x in leaves if getattr(path[-1], "name", "") == "ids")
