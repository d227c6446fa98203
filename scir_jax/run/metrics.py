"""metrics.jsonl, one line per step, each step exactly once; TensorBoard, Weights & Biases and Trackio beside it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scir_jax.data.jsonl import AppendOnly
from scir_jax.run.trackers import Tracker

MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~])")
MAX_CHARACTERS = 2000  # of a table's cell


class Metrics:
    """Scalars of training steps and evaluations.

    Lines of metrics.jsonl: `step` counts over the whole run, `stage_step` within the stage (completed steps).
    """

    def __init__(
        self, directory: Path, *, tensorboard: bool, config: dict[str, Any], wandb: bool = False, trackio: bool = False
    ):
        """
        Args:
          config: the settings that Weights & Biases and Trackio show.

        Raises:
          InputError: one of both is asked for and not installed.
        """
        self.directory = directory
        self._file = AppendOnly(directory / "metrics.jsonl")
        self._tensorboard = tensorboard
        self._events = None
        wanted = {"wandb": wandb, "trackio": trackio}
        self._trackers = [Tracker(name, directory, config) for name, asked in wanted.items() if asked]
        self._offset = 0

    def start_stage(self, stage: str, iteration: int, completed: int) -> None:
        """Forgets the stage's steps after `completed`, which will be done again."""
        rows = self._file.cut(
            lambda r: (r["stage"], r["iteration"]) != (stage, iteration) or r["stage_step"] <= completed
        )
        before = [r["step"] for r in rows if (r["stage"], r["iteration"]) != (stage, iteration)]
        self._offset = max(before, default=0)
        self._open_events(self._offset + completed + 1)

    def stage(self, stage: str, iteration: int) -> list[dict[str, Any]]:
        """Returns the rows of a stage's steps so far."""
        return [row for row in self._file.rows() if (row["stage"], row["iteration"]) == (stage, iteration)]

    def sha256(self) -> str:
        """Computes the SHA-256 of metrics.jsonl as it is now; "" where there is none."""
        return self._file.sha256()

    def write(self, stage: str, iteration: int, stage_step: int, values: dict[str, float]) -> None:
        """Writes one training step; a value that is not finite is written as null."""
        step = self._offset + stage_step
        clean = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write({"step": step, "stage": stage, "iteration": iteration, "stage_step": stage_step, **clean})
        self._emit(clean, step)

    def evaluation(self, values: dict[str, Any]) -> None:
        """Writes an evaluation's numbers into the event files, at the last step written."""
        numbers = {f"eval_{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        self._emit(numbers, self._last_step())

    def tables(self, tables: dict[str, list[dict[str, Any]]]) -> None:
        """Shows tables of texts, at the last step written; nothing where nobody but metrics.jsonl is written.

        Args:
          tables: name -> rows, mappings with the same keys.
        """
        if self._events is None and not self._trackers:
            return
        step = self._last_step()
        for name, rows in tables.items():
            if not rows:
                continue
            columns = list(rows[0])
            cells = [[_cell(row.get(column)) for column in columns] for row in rows]
            if self._events is not None:
                self._events.add_text(name, _markdown(columns, cells), step)
            for tracker in self._trackers:
                tracker.table(name, columns, cells, step)

    def sync(self) -> None:
        """Brings everything written so far to the disk before it returns."""
        self._file.sync()

    def close(self) -> None:
        """Closes the files and ends the logs."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        for tracker in self._trackers:
            tracker.finish()

    def _last_step(self) -> int:
        return max((row["step"] for row in self._file.rows()), default=0)

    def _emit(self, values: dict[str, float | None], step: int) -> None:
        present = {k: v for k, v in values.items() if v is not None}
        if self._events is not None:
            for name, value in present.items():
                self._events.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(present, step)

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

    def stage(self, stage: str, iteration: int) -> list[dict[str, Any]]:
        """Returns none."""
        return []

    def sha256(self) -> str:
        """Returns ""."""
        return ""

    def write(self, stage: str, iteration: int, stage_step: int, values: dict[str, float]) -> None:
        """Does nothing."""
        pass

    def evaluation(self, values: dict[str, Any]) -> None:
        """Does nothing."""
        pass

    def tables(self, tables: dict[str, list[dict[str, Any]]]) -> None:
        """Does nothing."""
        pass

    def sync(self) -> None:
        """Does nothing."""
        pass

    def close(self) -> None:
        """Does nothing."""
        pass


def _cell(value: Any) -> Any:
    """Returns a table's cell; packages that keep tables need plain values."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = ", ".join(f"{x:.3f}" for x in value) if isinstance(value, (list, tuple)) else str(value)
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ... [cut]"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Writes a table as Markdown, in which the texts of a model are texts and nothing else."""

    def line(values: Sequence[Any]) -> str:
        return f"| {' | '.join(map(_escaped, values))} |"

    return "\n".join([line(columns), "|" + " --- |" * len(columns), *map(line, rows)])


def _escaped(value: Any) -> str:
    shown = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    # The end of a line would end the row.
    return " ↵ ".join(MARKUP.sub(r"\\\1", html.escape(part, quote=False)) for part in shown.splitlines())
