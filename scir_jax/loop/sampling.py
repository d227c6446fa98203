"""The sampling stage: N responses a prompt, written as they come, the same whatever batch or interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.data import records
from scir_jax.data.encode import Prompt
from scir_jax.data.messages import prompt_text
from scir_jax.data.rows import fill, pad
from scir_jax.engine.mesh import put_batch
from scir_jax.engine.metrics import AppendOnly
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.errors import InputError
from scir_jax.loop import console
from scir_jax.loop.session import Session


def sample_rows(
    session: Session, params, prompts: Sequence[tuple[int, Prompt]], *, responses: int, sampling: Sampling, key
) -> list[dict[str, Any]]:
    """Responses to one batch of (prompt number, prompt), at most sample.batch_size; a row a response."""
    size = session.config.sample.batch_size
    ids = np.stack([pad(p.conversation, session.shapes.prompt, session.chat.pad_id) for _, p in prompts])
    lengths = np.array([len(p.conversation) for _, p in prompts], np.int32)
    index = np.array([number for number, _ in prompts], np.int32)
    ids, lengths = fill((ids, lengths), size)
    index = np.concatenate([index, np.full(size - len(index), -1, np.int32)])
    samples = session.sampler(responses)(params, *put_batch((ids, lengths, index), session.mesh), key, sampling)
    tokens, counts, logps = (np.asarray(x) for x in samples)
    check_finite(logps[: len(prompts)], "log-probabilities")
    rows = []
    for i, (number, prompt) in enumerate(prompts):
        for n in range(responses):
            response = tokens[i, n, : counts[i, n]].tolist()
            ended = bool(response) and response[-1] in session.chat.stop_ids
            rows.append(
                {
                    "prompt_number": number,
                    "sample": n,
                    "prompt": prompt_text(prompt.messages),
                    "messages": prompt.messages,
                    "response": session.chat.decode(response),
                    "prompt_ids": list(prompt.conversation),
                    "response_ids": response,
                    "stop": "eos" if ended else "length",
                    "logprob": float(logps[i, n]),
                }
            )
    return rows


def check_finite(values: np.ndarray, what: str) -> None:
    """InputError where a model gives NaN or infinity: its weights are broken, and nothing made of it is of use."""
    if not np.isfinite(values).all():
        raise InputError(f"the model gives {what} that are not finite; its weights are broken")


def sample_file(
    session: Session,
    params,
    prompts: Sequence[tuple[int, Prompt]],
    path: Path,
    *,
    responses: int,
    sampling: Sampling,
    key,
    title: str,
    stopper: console.Stopper,
    resumable: bool = True,
) -> None:
    """Writes responses to `path`. An interrupted file is taken up again after its last complete batch.

    Args:
      resumable: what Ctrl-C says: whether the same command goes on or starts again.
    """
    partial = AppendOnly(path.with_name(path.name + ".partial"))
    size = session.config.sample.batch_size
    done = len(partial.cut(lambda row: True)) // (size * responses)
    kept = done * size * responses
    counter = iter(range(1 << 62))
    partial.cut(lambda row: next(counter) < kept)
    parts = list(records.batched(prompts, size))
    tokens = 0
    with console.stage(title, len(parts), done) as bar:
        for part in parts[done:]:
            stopper.check(title, resumable=resumable)
            rows = sample_rows(session, params, part, responses=responses, sampling=sampling, key=key)
            for row in rows:
                partial.write(row)
            partial.sync()
            tokens = sum(len(row["response_ids"]) for row in rows)
            bar.advance(f"{tokens / max(len(rows), 1):.0f} tokens a response")
    partial.close()
    partial.path.replace(path)


def iteration_prompts(session: Session, iteration: int) -> list[tuple[int, Prompt]]:
    """The prompts of an iteration: consecutive parts of one seeded permutation, round again where it ends."""
    prompts = session.data.prompts
    config = session.config
    count = config.sample.prompts or max(len(prompts) // max(config.run.iterations, 1), 1)
    order = np.random.default_rng(np.random.SeedSequence([config.run.seed, 0])).permutation(len(prompts))
    numbers = [int(order[i % len(prompts)]) for i in range((iteration - 1) * count, iteration * count)]
    numbers = list(dict.fromkeys(numbers))
    return [(number, prompts[number]) for number in numbers]


def run_sampling(session: Session, params, iteration: int, path: Path, stopper: console.Stopper) -> None:
    """responses.jsonl of an iteration."""
    config = session.config.sample
    sample_file(
        session,
        params,
        iteration_prompts(session, iteration),
        path,
        responses=config.responses,
        sampling=Sampling.of(config.temperature, config.top_p, config.top_k),
        key=stream_key(session.config.run.seed, "responses", iteration),
        title=f"iteration {iteration}: sample",
        stopper=stopper,
    )
