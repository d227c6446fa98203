"""The stage that constructs pairs of known order from an iteration's answers, which teach the judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder, Marked
from scir_jax.data.files import read_rows
from scir_jax.data.jsonl import write_rows
from scir_jax.data.pairs import Answer, Pair, from_row, to_row
from scir_jax.engine.hosts import hosts
from scir_jax.errors import InputError
from scir_jax.method.constructed import construct
from scir_jax.run.answers import Source
from scir_jax.run.pairing import different

NAME = "constructed.jsonl"


def construct_pairs(config: Config, encoder: Encoder, iteration: int, source: Source, path: Path) -> None:
    """Writes constructed.jsonl: pairs whose first answer is the better one by construction.

    Raises:
      InputError: no pair can be constructed.
    """
    items = source.items
    groups = different(items)
    prompts = [set(items[group[0]][0].ids) for group in groups]
    rng = np.random.default_rng(np.random.SeedSequence([config.run.seed, 3, iteration]))
    rows = []
    for kind, better, worse in construct(groups, prompts, config.judge.constructions, rng):
        prompt, answer = items[better]
        other = truncated(encoder, answer) if worse is None else items[worse][1]
        if other is not None and other.quote != answer.quote:
            row = to_row(Pair(prompt, answer, other, label=1.0), len(rows))
            rows.append({**row, "construction": kind})
    if not rows:
        raise InputError(
            f"iteration {iteration}: no pair can be constructed of the responses, which are all alike or of one token; "
            "set judge.constructions to others, or judge.constructed_batch_size to 0"
        )
    if hosts.first():
        write_rows(path, rows)


def truncated(encoder: Encoder, answer: Answer) -> Answer | None:
    """Returns the first half of an answer, without a stop token; None where nothing would be left of it."""
    ended = bool(answer.ids) and answer.ids[-1] in encoder.chat.stop_ids
    half = (len(answer.ids) - ended) // 2
    cut = encoder.sampled(answer.ids[:half])
    return cut if cut.quote else None


def constructed_rows(encoder: Encoder, path: Path) -> list[Marked]:
    """Returns the judge's questions about an iteration's constructed pairs, in both orders, with the right verdicts.

    Raises:
      InputError: a row is bad.
    """
    pairs = [from_row(row, where) for where, row in read_rows(path)]
    return [row for judge in encoder.judges for pair in pairs for row in encoder.verdict_rows(judge, pair)]
