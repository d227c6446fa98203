"""What a person sees: a progress bar for each stage, a line when it is finished, tables. Quiet where nobody watches."""

from __future__ import annotations

import contextlib
import io
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from scir_jax.bucket.objects import shown
from scir_jax.engine.hosts import hosts
from scir_jax.errors import Interrupted
from scir_jax.run.columns import CONSOLE, MODEL, cells

stderr = Console(stderr=True, highlight=False)


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed and speed >= 1 else f"{1 / speed:.1f} s each" if speed else "")


class Bar:
    """One stage's progress."""

    def __init__(self, progress: Progress, task, shown: _Cell | None = None):
        self._progress, self._task, self._shown = progress, task, shown

    def advance(self, note: str = "", by: int = 1, total: int | None = None) -> None:
        """Moves the bar on, and shows a note beside it; a total takes the place of the one that was expected."""
        self._progress.update(self._task, advance=by, note=note, total=total)
        if self._shown is not None:
            self._shown.update()


class _Cell:
    """A bar in a notebook's output, drawn anew every half second at the most; it needs no widgets."""

    def __init__(self, progress: Progress):
        from IPython.display import display

        self._progress, self._drawn = progress, time.monotonic()
        self._handle = display(progress, display_id=True)

    def update(self) -> None:
        if time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            self._handle.update(self._progress)

    def end(self, line: str) -> None:
        self._handle.update(Text(line))


@contextlib.contextmanager
def stage(title: str, total: int, done: int = 0, note: str = "", window: float = 30) -> Iterator[Bar]:
    """Shows a progress bar while inside, and one line with the stage's time afterwards.

    Args:
      window: seconds over which its rate is measured.
    """
    started = time.monotonic()
    columns = [TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()]
    with Progress(
        *columns,
        TextColumn("[dim]{task.fields[note]}"),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
        speed_estimate_period=window,
    ) as progress:
        task = progress.add_task(title, total=total, completed=done, note=note)
        cell = _Cell(progress) if stderr.is_jupyter and not stderr.quiet else None
        yield Bar(progress, task, cell)
    line = f"{title:<28} done, {time.monotonic() - started:.1f} s"
    if cell is None:
        stderr.print(line)
    else:
        cell.end(line)


def show(table: Table) -> None:
    """Prints a table on stderr, 100 columns wide where nobody watches."""
    console = stderr if stderr.is_terminal else Console(stderr=True, highlight=False, quiet=stderr.quiet, width=100)
    console.print(table)


def say(message: str) -> None:
    """Prints a line on stderr."""
    stderr.print(shown(message), soft_wrap=True, markup=False)


def table(rows: list[dict[str, Any]], title: str, best: str | None = None) -> Table:
    """Makes a table with one row per model; columns that no row has are left out.

    Args:
      best: name of the model to mark.
    """
    present = tuple(column for column in CONSOLE if any(row.get(column.key) is not None for row in rows))
    marked = any(row.get("model") == best for row in rows)
    result = Table(title=title, caption="* the best model, exported" if marked else None)
    for column in present:
        result.add_column(column.title, justify="left" if column == MODEL else "right")
    for row in rows:
        name, *values = cells(row, present)
        result.add_row(f"{name} *" if name == best else name, *values)
    return result


def table_text(rows: list[dict[str, Any]], title: str, best: str | None = None) -> str:
    """Writes the table of models as a text, 140 columns wide."""
    console = Console(file=io.StringIO(), width=140, force_jupyter=False, force_terminal=False)
    with console.capture() as captured:
        console.print(table(rows, title, best))
    return captured.get()


def print_table(rows: list[dict[str, Any]], title: str, best: str | None = None) -> None:
    """Prints the table of models on stdout, 140 columns wide where nobody watches."""
    console = Console(highlight=False, quiet=stderr.quiet)
    if not console.is_terminal:
        console = Console(highlight=False, quiet=stderr.quiet, width=140)
    console.print(table(rows, title, best))


def only_first_host_speaks() -> None:
    """Silences bars, tables and notes of the other hosts, which would be the same; their errors are still printed."""
    stderr.quiet = not hosts.first()


class Stopper:
    """Turns the first Ctrl-C or SIGTERM, at whichever host, into a request that all answer at their next safe point.

    Python handles signals in its main thread alone; in another one they are left as they are.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._votes = hosts.Votes()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _) -> None:
        if self.signal is not None:
            raise Interrupted("stopped at once; run the same command again to go on from the last checkpoint", number)
        self.signal = number
        say("stopping at the next safe point; once more stops at once")

    def vote(self) -> bool:
        """Lets all hosts vote on whether to stop: each must call it at the same place, and all get the same answer.

        Of several hosts it is the answer to the call before, so that no device is waited for.
        """
        return self._votes.cast(self.signal is not None)

    def check(self, where: str, *, resumable: bool = True) -> None:
        """Raises Interrupted if any host was asked to stop. All call it where everything done so far is saved."""
        if hosts.vote(self.signal is not None):
            self.stop(where, resumable=resumable)

    def stop(self, where: str, *, resumable: bool = True) -> None:
        """Raises Interrupted."""
        how = "everything is saved: run the same command again to go on" if resumable else "nothing is written"
        raise Interrupted(f"stopped in {where}; {how}", self.signal or signal.SIGTERM)
