"""What the data files hold in tokens: the table that is shown before training, and data.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from scir_jax.data.tally import Tally

PERCENTILES = (50, 90, 99, 100)
WIDTH = 100


@dataclass(frozen=True)
class FileStatistics:
    """One data file in tokens.

    Attributes:
      prompts, answers: tokens of each prompt and of each answer, before the limits cut them.
      prompts_cut, answers_cut: how many of them the limits cut.
      rows: tokens of each row as it is padded.
      row_tokens: the static length that these rows are padded to; 0 where none is.
    """

    tally: Tally
    prompts: Sequence[int]
    answers: Sequence[int]
    prompts_cut: int
    answers_cut: int
    rows: Sequence[int]
    row_tokens: int

    @property
    def padding(self) -> float | None:
        """The padding's share of the padded rows."""
        return 1 - float(np.mean(self.rows)) / self.row_tokens if self.row_tokens and len(self.rows) else None

    def to_dict(self) -> dict[str, Any]:
        """Returns the statistics as data.json has them."""
        return {
            "path": self.tally.path,
            "rows": self.tally.rows,
            "used": self.tally.used,
            "left_out": dict(self.tally.left_out),
            "bad_rows": self.tally.examples,
            "prompt_tokens": _percentiles(self.prompts),
            "prompts_cut": _share(self.prompts_cut, self.prompts),
            "answer_tokens": _percentiles(self.answers),
            "answers_cut": _share(self.answers_cut, self.answers),
            "row_tokens": self.row_tokens,
            "padding": self.padding,
        }


def table(files: dict[str, FileStatistics]) -> Table:
    """Makes a table with one row per file, at most 100 columns wide."""
    title = "data, in tokens (p50/p90/p99/max)"
    result = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False, width=WIDTH)
    result.add_column("file", no_wrap=True)
    for name in ("rows", "used", "prompts", "cut", "answers", "cut", "row", "pad"):
        result.add_column(name, justify="right", no_wrap=True)
    for key, file in files.items():
        values = file.to_dict()
        result.add_row(
            key,
            str(values["rows"]),
            str(values["used"]),
            _joined(values["prompt_tokens"]),
            _percent(values["prompts_cut"]),
            _joined(values["answer_tokens"]),
            _percent(values["answers_cut"]),
            str(file.row_tokens or "-"),
            _percent(file.padding),
        )
    return result


def left_out(tallies: dict[str, Tally]) -> list[str]:
    """Writes one sentence per file that lost rows, with the reasons and the first bad row."""
    return [
        f"{key}: {tally.left_out.total()} of {tally.rows} rows left out: {tally.reasons()}"
        + (f" (first: {tally.examples[0]})" if tally.examples else "")
        for key, tally in tallies.items()
        if tally.left_out
    ]


def _percentiles(lengths: Sequence[int]) -> dict[str, int] | None:
    if not len(lengths):
        return None
    values = np.percentile(lengths, PERCENTILES, method="higher")
    return {"max" if p == 100 else f"p{p}": int(v) for p, v in zip(PERCENTILES, values, strict=True)}


def _share(count: int, of: Sequence[int]) -> float | None:
    return count / len(of) if len(of) else None


def _joined(percentiles: dict[str, int] | None) -> str:
    return "/".join(map(str, percentiles.values())) if percentiles else "-"


def _percent(share: float | None) -> str:
    """Writes a share in percent, rounded up: where anything at all is cut it is not 0 %."""
    return "-" if share is None else f"{int(np.ceil(100 * share - 1e-9))} %"
