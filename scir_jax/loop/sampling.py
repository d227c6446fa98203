"""The sampling stage: N responses a prompt, written as they come, the same whatever batch or interruption."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.data import records
from scir_jax.data.encode import Prompt
from scir_jax.data.messages import prompt_text
from scir_jax.data.rows import pad, taken
from scir_jax.engine import hosts
from scir_jax.engine.mesh import owned_rows, put_batch
from scir_jax.engine.metrics import AppendOnly
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.errors import InputError
from scir_jax.loop import console
from scir_jax.loop.session import Session


def sample_rows(
    session: Session,
    params,
    prompts: Sequence[tuple[int, Prompt]],
    *,
    responses: int,
    sampling: Sampling,
    key,
    owned: bool = False,
) -> list[dict[str, Any]]:
    """Responses to one batch of (prompt number, prompt), at most sample.batch_size; a row a response.

    Args:
      owned: of several hosts, each gives the rows that are its own to write; by default all give all.
    """
    size = session.config.sample.batch_size
    rows_here = session.local_rows(size)
    mine = taken(prompts, rows_here)
    ids = np.stack([pad(p.conversation, session.facts.shapes.prompt, session.chat.pad_id) for _, p in mine])
    lengths = np.array([len(p.conversation) for _, p in mine], np.int32)
    index = np.array([number for number, _ in mine], np.int32)
    index[rows_here >= len(prompts)] = -1
    samples = session.sampler(responses)(params, *put_batch((ids, lengths, index), session.mesh), key, sampling)
    tokens, counts, logps = (np.asarray(x) for x in samples)
    check_finite(logps[: len(prompts)], "log-probabilities")
    rows = []
    for i in owned_rows(session.mesh, size) if owned else range(size):
        if i >= len(prompts):
            break
        number, prompt = prompts[i]
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
    """Writes responses to `path`, every host its share. An interrupted file goes on after its last whole batch.

    Args:
      resumable: what Ctrl-C says: whether the same command goes on or starts again.
    """
    size = session.config.sample.batch_size
    place = {number: i for i, (number, _) in enumerate(prompts)}
    done = hosts.decide(lambda: _gather_parts(path, place, size, responses))
    partial = AppendOnly(_part(path, hosts.index()))
    batches = list(records.batched(prompts, size))
    with console.stage(title, len(batches), done) as bar:
        for batch in batches[done:]:
            stopper.check(title, resumable=resumable)
            rows = sample_rows(session, params, batch, responses=responses, sampling=sampling, key=key, owned=True)
            for row in rows:
                partial.write(row)
            partial.sync()
            tokens = sum(len(row["response_ids"]) for row in rows)
            bar.advance(f"{tokens / max(len(rows), 1):.0f} tokens a response")
    partial.close()
    hosts.barrier(f"sampled {path}")
    if hosts.first():
        _gather_parts(path, place, size, responses)
        _part(path, 0).replace(path)
    hosts.barrier(f"wrote {path}")


def parts(path: Path) -> list[Path]:
    """What hosts wrote of a file that is not whole yet, the first host's part first."""
    first = _part(path, 0)
    others = sorted(path.parent.glob(f"{glob.escape(first.name)}-[0-9]*"))
    return [first, *others] if first.exists() else others


def _part(path: Path, host: int) -> Path:
    return path.with_name(f"{path.name}.partial" + (f"-{host}" if host else ""))


def _gather_parts(path: Path, place: dict[int, int], size: int, responses: int) -> int:
    """Puts what hosts wrote, perhaps others than now, into the first one's part, in order; how many whole batches."""
    first = AppendOnly(_part(path, 0))
    parts_found = parts(path)
    found = [row for part in parts_found for row in AppendOnly(part).rows() if row["prompt_number"] in place]
    # Ended between writing the first part and removing the others, both have the same rows.
    by_place = {(place[row["prompt_number"]], row["sample"]): row for row in found}
    rows = [by_place[key] for key in sorted(by_place)]
    done = 0
    while chunk := rows[done * size * responses : (done + 1) * size * responses]:
        last = min((done + 1) * size, len(place))
        if len(chunk) < (last - done * size) * responses or place[chunk[-1]["prompt_number"]] >= last:
            break
        done += 1
    first.rewrite(rows[: done * size * responses])
    for part in parts_found:
        if part != first.path:
            part.unlink()
    return done


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
