"""Scores of many responses and pairs under one set of parameters, batch by batch in fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from scir_jax.data.encode import Prompt, Response
from scir_jax.data.records import batched
from scir_jax.data.rows import pad_rows, stack, taken
from scir_jax.engine.forward import Judged
from scir_jax.engine.mesh import put_batch
from scir_jax.loop.sampling import check_finite
from scir_jax.loop.session import Session

Pair = tuple[Prompt, Response, Response]


def nothing(*_) -> None:
    """Does not report progress."""


def response_logps(
    session: Session, params, items: Sequence[tuple[Prompt, Response]], advance: Callable[[], None] = nothing
) -> np.ndarray:
    """log pi(y|x) of each response, [len(items)] float32 nats, summed over its tokens with the stop token."""
    size = 2 * session.config.evaluate.batch_size
    result = []
    for part in batched(items, size):
        mine = taken(part, session.local_rows(size))
        rows = pad_rows(
            [session.encoder.scored_row(*item) for item in mine], session.shapes.scored, session.chat.pad_id
        )
        logps = session.scorer(params, put_batch(rows, session.mesh))
        result.append(np.asarray(logps)[: len(part)])
        check_finite(result[-1], "log-probabilities")
        advance()
    return np.concatenate(result) if result else np.zeros(0, np.float32)


def judge_pairs(session: Session, params, pairs: Sequence[Pair], advance: Callable[[], None] = nothing) -> Judged:
    """Verdicts [P, G, 2, 2] and verdict mass [P, G, 2] of pairs in both orders, NumPy float32."""
    size = session.config.evaluate.batch_size
    verdicts, mass = [], []
    for part in batched(pairs, size):
        mine = taken(part, session.local_rows(size))
        rows = tuple(
            stack(
                [
                    pad_rows(
                        [session.encoder.judge_row(judge, prompt, *order) for order in ((a, b), (b, a))],
                        tokens,
                        session.chat.pad_id,
                    )
                    for prompt, a, b in mine
                ]
            )
            for judge, tokens in zip(session.judges, session.shapes.judges, strict=True)
        )
        judged = session.judge(params, put_batch(rows, session.mesh))
        verdicts.append(np.asarray(judged.verdicts)[: len(part)])
        mass.append(np.asarray(judged.mass)[: len(part)])
        check_finite(verdicts[-1], "verdicts")
        check_finite(mass[-1], "verdicts")
        advance()
    if not pairs:
        templates = len(session.judges)
        return Judged(np.zeros((0, templates, 2, 2), np.float32), np.zeros((0, templates, 2), np.float32))
    return Judged(np.concatenate(verdicts), np.concatenate(mass))


class PairScores(NamedTuple):
    """Both reward models' raw material for P pairs, NumPy float32. The [P, 2] log-probabilities (nats) are None
    without a reference; `lengths` are tokens."""

    judged: Judged
    logps: np.ndarray | None
    reference_logps: np.ndarray | None
    lengths: np.ndarray


def score_pairs(
    session: Session,
    pairs: Sequence[Pair],
    *,
    model: Callable[[], Any],
    reference: Callable[[], Any] | None,
    advance: Callable[[], None] = nothing,
) -> PairScores:
    """Scores pairs under a model and its reference.

    Args:
      model, reference: give parameters when called, the reference's first, so that one copy is there at a time.
    """
    items = [(prompt, y) for prompt, a, b in pairs for y in (a, b)]
    lengths = np.array([len(y.ids) for _, y in items], np.float32).reshape(-1, 2)
    logps = reference_logps = None
    if reference is not None:
        reference_logps = response_logps(session, reference(), items, advance).reshape(-1, 2)
    params = model()
    if reference is not None:
        logps = response_logps(session, params, items, advance).reshape(-1, 2)
    return PairScores(judge_pairs(session, params, pairs, advance), logps, reference_logps, lengths)


def score_batches(session: Session, pairs: int, *, with_reference: bool) -> int:
    """How often `score_pairs` calls `advance`."""
    return (3 if with_reference else 1) * batches_of(pairs, session.config.evaluate.batch_size)


def batches_of(items: int, size: int) -> int:
    return -(-items // size)
