"""What becomes of a data file's rows: used, or left out and why. No row is left out silently."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from scir_jax.errors import InputError

ALWAYS_ALLOWED = 10
"""bad rows of a file that may be left out however few rows it has"""


class PromptTooLong(InputError):
    """An over-long prompt where text.long_prompts is error: it stops the run, it is not a bad row."""


class Tally:
    """Counts one file's rows, and decides on bad ones.

    Attributes:
      path: as the configuration names the file.
      rows, used: rows in the file, rows that are left of them.
      left_out: reason -> rows.
      bad: rows that could not be understood, part of `left_out`.
      examples: the first bad rows' sentences.
    """

    def __init__(self, path: str, on_bad_row: Literal["error", "skip"] = "error", max_bad_rows: float = 0.0):
        self.path = path
        self.on_bad_row = on_bad_row
        self.max_bad_rows = max_bad_rows
        self.rows = self.used = self.bad = 0
        self.left_out: Counter[str] = Counter()
        self.examples: list[str] = []

    @contextmanager
    def row(self, where: str) -> Iterator[None]:
        """Takes an InputError of the code inside as a bad row's: raises it, or counts it where bad rows are skipped.

        Args:
          where: names the row in the error.

        Raises:
          InputError: the row is bad, and bad rows are not skipped.
          PromptTooLong: a prompt is too long, whatever becomes of bad rows.
        """
        try:
            yield
        except InputError as error:
            sentence = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if isinstance(error, PromptTooLong) or self.on_bad_row == "error":
                raise type(error)(sentence) from None
            self.bad += 1
            self.leave_out(_reason(sentence.removeprefix(where).removeprefix(": ")))
            self.examples = [*self.examples, sentence][:3]

    def leave_out(self, reason: str) -> None:
        """Counts a row that is left out for a reason."""
        self.left_out[reason] += 1

    def check(self) -> None:
        """Checks that no more rows are bad than may be.

        Raises:
          InputError: more rows are bad.
        """
        allowed = max(ALWAYS_ALLOWED, int(self.max_bad_rows * self.rows))
        if self.bad > allowed:
            raise InputError(
                f"{self.path}: {self.bad} of {self.rows} rows are bad, data.max_bad_rows={self.max_bad_rows:g} allows "
                f"{allowed}; the first: {'; '.join(self.examples)}"
            )

    def finish(self, used: int) -> None:
        """Takes note of the rows that are used.

        Raises:
          InputError: no row is used, or too many are bad.
        """
        self.check()
        self.used = used
        if not used:
            raise InputError(f"{self.path}: no row is left of {self.rows}: {self.reasons()}")

    def reasons(self) -> str:
        """Lists the reasons with their numbers of rows, the most frequent one first."""
        return ", ".join(f"{count} x {reason}" for reason, count in self.left_out.most_common())


def _reason(sentence: str) -> str:
    """Returns a bad row's sentence without what differs from row to row."""
    sentence = sentence.split("; ")[0]
    return re.sub(r"\[\d+\]|( in line \d+)? at column \d+|, not .*|, found .*", "", sentence)[:80]
