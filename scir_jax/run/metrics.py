"""metrics.jsonl, one line per step, each step exactly once; TensorBoard events and Weights & Biases beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from scir_jax.data.jsonl import AppendOnly
from scir_jax.errors import InputError


class Metrics:
    """Scalars of training steps and evaluations.

    Lines of metrics.jsonl: `step` counts over the whole run, `stage_step` within the stage (completed steps).
    """

    def __init__(self, directory: Path, *, tensorboard: bool, wandb: bool, config: dict[str, Any]):
        self.directory = directory
        self._file = AppendOnly(directory / "metrics.jsonl")
        self._tensorboard = tensorboard
        self._events = None
        self._wandb = _wandb_run(directory, config) if wandb else None
        self._offset = 0

    def start_stage(self, stage: str, iteration: int, completed: int) -> None:
        """Forgets the stage's steps after `completed`, which will be done again."""
        rows = self._file.cut(
            lambda r: (r["stage"], r["iteration"]) != (stage, iteration) or r["stage_step"] <= completed
        )
        before = [r["step"] for r in rows if (r["stage"], r["iteration"]) != (stage, iteration)]
        self._offset = max(before, default=0)
        self._open_events(self._offset + completed + 1)

    def write(self, stage: str, iteration: int, stage_step: int, values: dict[str, float]) -> None:
        """Writes one training step; a value that is not finite is written as null."""
        step = self._offset + stage_step
        clean = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write({"step": step, "stage": stage, "iteration": iteration, "stage_step": stage_step, **clean})
        self._emit(clean, step)

    def evaluation(self, values: dict[str, Any]) -> None:
        """Writes an evaluation's numbers into the event files, at the last step written."""
        numbers = {f"eval_{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        self._emit(numbers, max((row["step"] for row in self._file.rows()), default=0))

    def sync(self) -> None:
        """Brings everything written so far to the disk before it returns."""
        self._file.sync()

    def close(self) -> None:
        """Closes the files, and ends the run of Weights & Biases."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _emit(self, values: dict[str, float | None], step: int) -> None:
        present = {k: v for k, v in values.items() if v is not None}
        if self._events is not None:
            for name, value in present.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**present, "step": step})

    def _open_events(self, first_step: int) -> None:
        if not self._tensorboard:
            return
        from tensorboardX import SummaryWriter

        if self._events is not None:
            self._events.close()
        # TensorBoard drops what an interrupted run had written from this step on.
        self._events = SummaryWriter(str(self.directory / "tensorboard"), purge_step=first_step, flush_secs=10)


class NoMetrics(Metrics):
    """Writes nothing: for the hosts that leave writing to the first one."""

    def __init__(self) -> None:
        pass

    def start_stage(self, stage: str, iteration: int, completed: int) -> None:
        """Does nothing."""
        pass

    def write(self, stage: str, iteration: int, stage_step: int, values: dict[str, float]) -> None:
        """Does nothing."""
        pass

    def evaluation(self, values: dict[str, Any]) -> None:
        """Does nothing."""
        pass

    def sync(self) -> None:
        """Does nothing."""
        pass

    def close(self) -> None:
        """Does nothing."""
        pass


def _wandb_run(directory: Path, config: dict[str, Any]):
    try:
        import wandb
    except ImportError:
        raise InputError("run.wandb is true but wandb is not installed; pip install 'scir_jax[wandb]'") from None
    return wandb.init(dir=str(directory), name=directory.name, config=config, resume="allow", id=directory.name)
