"""The sampling stage: N responses to each prompt, written as they come, the same whatever batch or interruption."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.config.schema import Config, SampleConfig
from scir_jax.data.encode import Encoder
from scir_jax.data.jsonl import AppendOnly, batched
from scir_jax.data.pairs import Prompt, answer_row
from scir_jax.engine.hosts import hosts
from scir_jax.engine.mesh import owned_rows, put_batch
from scir_jax.engine.programs import Programs
from scir_jax.engine.sampler import Sampling, stream_key
from scir_jax.run import console
from scir_jax.run.scoring import check_finite

Numbered = tuple[int, Prompt]


def settings_of(config: SampleConfig) -> Sampling:
    """Returns the sampler's settings."""
    return Sampling.of(config.temperature, config.top_p, config.top_k)


def sample_rows(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    prompts: Sequence[Numbered],
    *,
    responses: int,
    sampling: Sampling,
    key: Any,
    owned: bool = False,
) -> list[dict[str, Any]]:
    """Samples responses to one batch of numbered prompts, at most sample.batch_size; one row per response.

    Args:
      key: of the stream of randomness, see engine.sampler.stream_key.
      owned: of several hosts, each gives the rows that are its own to write; by default all give all.

    Raises:
      InputError: the model gives values that are not finite.
    """
    spec, mesh = programs.prompt_spec(responses), programs.mesh
    numbered = [(number, prompt.ids) for number, prompt in prompts]
    mine = [numbered[i] if i < len(numbered) else None for i in programs.local_rows(spec.prompts)]
    batch = put_batch(spec.arrays(mine, encoder.chat.pad_id), mesh)
    samples = programs.sampler(responses)(params, batch, key, sampling)
    tokens, counts, logps = (np.asarray(x) for x in samples)
    check_finite(logps[: len(prompts)], "log-probabilities")
    rows = []
    for i in owned_rows(mesh, spec.prompts) if owned else range(spec.prompts):
        if i >= len(prompts):
            break
        number, prompt = prompts[i]
        for n in range(responses):
            answer = encoder.sampled(tokens[i, n, : counts[i, n]].tolist())
            ended = bool(answer.ids) and answer.ids[-1] in encoder.chat.stop_ids
            rows.append(
                {
                    "prompt_number": number,
                    "sample": n,
                    **answer_row(prompt, answer),
                    "stop": "eos" if ended else "length",
                    "logprob": float(logps[i, n]),
                }
            )
    return rows


def sample_file(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    prompts: Sequence[Numbered],
    path: Path,
    *,
    responses: int,
    sampling: Sampling,
    key: Any,
    title: str,
    stopper: console.Stopper,
    resumable: bool = True,
) -> None:
    """Writes responses to `path`, every host its share. An interrupted file goes on after its last whole batch.

    Args:
      resumable: what Ctrl-C says: whether the same command goes on or starts again.
    """
    size = programs.prompt_spec(responses).prompts
    place = {number: i for i, (number, _) in enumerate(prompts)}
    done = hosts.decide(lambda: _gather_parts(path, place, size, responses))
    partial = AppendOnly(_part(path, hosts.index()))
    batches = list(batched(prompts, size))
    with console.stage(title, len(batches), done) as bar:
        for batch in batches[done:]:
            stopper.check(title, resumable=resumable)
            rows = sample_rows(
                encoder, programs, params, batch, responses=responses, sampling=sampling, key=key, owned=True
            )
            for row in rows:
                partial.write(row)
            partial.sync()
            tokens = sum(len(row["response_ids"]) for row in rows)
            bar.advance(f"{tokens / max(len(rows), 1):.0f} tokens per response")
    partial.close()
    hosts.barrier(f"sampled {path}")
    if hosts.first():
        _gather_parts(path, place, size, responses)
        _part(path, 0).replace(path)
    hosts.barrier(f"wrote {path}")


def parts(path: Path) -> list[Path]:
    """Lists what hosts wrote of a file that is not whole yet, the first host's part first."""
    first = _part(path, 0)
    others = sorted(path.parent.glob(f"{glob.escape(first.name)}-[0-9]*"))
    return [first, *others] if first.exists() else others


def _part(path: Path, host: int) -> Path:
    return path.with_name(f"{path.name}.partial" + (f"-{host}" if host else ""))


def _gather_parts(path: Path, place: dict[int, int], size: int, responses: int) -> int:
    """Puts what hosts wrote, perhaps others than now, into the first one's part, in order.

    Returns:
      The number of whole batches.
    """
    first = AppendOnly(_part(path, 0))
    parts_found = parts(path)
    found = [row for part in parts_found for row in AppendOnly(part).rows() if row["prompt_number"] in place]
    # A process that ended between writing the first part and removing the others left the same rows in both.
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


def iteration_prompts(config: Config, prompts: Sequence[Prompt], shares: int, iteration: int) -> list[Numbered]:
    """Returns the prompts of an iteration: consecutive parts of one seeded permutation; after its end it starts anew.

    Args:
      shares: into how many parts the prompts are divided where sample.prompts does not say how many there are.
    """
    count = config.sample.prompts or max(len(prompts) // max(shares, 1), 1)
    order = np.random.default_rng(np.random.SeedSequence([config.run.seed, 0])).permutation(len(prompts))
    numbers = [int(order[i % len(prompts)]) for i in range((iteration - 1) * count, iteration * count)]
    numbers = list(dict.fromkeys(numbers))
    return [(number, prompts[number]) for number in numbers]


def sample_iteration(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    params: Any,
    prompts: Sequence[Numbered],
    iteration: int,
    path: Path,
    stopper: console.Stopper,
) -> None:
    """Writes responses.jsonl of an iteration.

    Args:
      params: parameters of M_t.
      prompts: those of the iteration.
    """
    sample_file(
        encoder,
        programs,
        params,
        prompts,
        path,
        responses=config.sample.responses,
        sampling=settings_of(config.sample),
        key=stream_key(config.run.seed, "responses", iteration),
        title=f"iteration {iteration}: sample",
        stopper=stopper,
    )
