"""Sampling answers: slots are kept full, and every answer is the same whatever slot, company or interruption."""

from __future__ import annotations

import glob
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scir_jax.config.schema import Config, SampleConfig
from scir_jax.data.encode import Encoder
from scir_jax.data.jsonl import AppendOnly, batched
from scir_jax.data.pairs import Prompt, answer_row
from scir_jax.engine.hosts import hosts
from scir_jax.engine.mesh import owned_rows, put_batch
from scir_jax.engine.programs import Programs
from scir_jax.engine.sampler import Sampling, Slots, stream_key
from scir_jax.errors import InputError
from scir_jax.run import console, costs
from scir_jax.run.costs import Account
from scir_jax.run.places import save, sync
from scir_jax.run.scoring import check_finite

Numbered = tuple[int, Prompt]

SAVE_SECONDS = 30.0
"""between two times that the answers so far are brought into a bucket"""


class Task(NamedTuple):
    """Answers to a prompt that come into slots together, by their numbers."""

    number: int
    prompt: Prompt
    answers: tuple[int, ...]


class Finished(NamedTuple):
    """What came to an end at a look: how many answers with how many tokens, and their rows."""

    answers: int
    tokens: int
    rows: list[dict[str, Any]]


def settings_of(config: SampleConfig) -> Sampling:
    """Returns the sampler's settings."""
    return Sampling.of(config.temperature, config.top_p, config.top_k)


def sample(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    prompts: Sequence[Numbered],
    *,
    responses: int,
    sampling: Sampling,
    key: Any,
    owned: bool = False,
) -> Iterator[Finished]:
    """Samples responses to numbered prompts, and yields them as they are finished.

    Where the device's memory does not suffice, it goes on with half of the slots, once.

    Args:
      key: of the stream of randomness, see engine.sampler.stream_key.
      owned: of several hosts, each gives the rows that are its own to write; by default all give all.

    Raises:
      InputError: the model gives values that are not finite, or half of the slots are too many too.
    """
    settings = dict(responses=responses, sampling=sampling, key=key, owned=owned)
    done: set[tuple[int, int]] = set()
    try:
        yield from _sample(encoder, programs, params, prompts, done, **settings)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if not programs.halve_slots():
            raise InputError(
                f"the device has no memory for {programs.slot_spec.slots} answers at once; set sample.batch_size to "
                "half of it or less"
            ) from None
        console.say(f"the device's memory is exhausted: going on with {programs.slot_spec.slots} answers at once")
        yield from _sample(encoder, programs, params, prompts, done, **settings)


def _sample(
    encoder: Encoder,
    programs: Programs,
    params: Any,
    prompts: Sequence[Numbered],
    done: set[tuple[int, int]],
    *,
    responses: int,
    sampling: Sampling,
    key: Any,
    owned: bool,
) -> Iterator[Finished]:
    """Samples what is not done yet.

    Args:
      done: (prompt, answer) by their numbers; grows.
    """
    spec, sampler = programs.slot_spec, programs.sampler
    desk = _Desk(encoder, programs, prompts, responses, done)
    mine = set(owned_rows(programs.mesh, spec.slots).tolist()) if owned else set(range(spec.slots))
    slots = sampler.empty()
    while desk.waiting or desk.running:
        while coming := desk.admission():
            slots = sampler.admit(params, slots, put_batch(coming, programs.mesh))
        slots, ended = sampler.decode(params, slots, key, sampling, np.int32(desk.until))
        finished = [slot for slot, over in enumerate(np.asarray(ended)) if over and slot in desk.running]
        if finished:
            left = desk.leave(finished)
            yield finished_rows(encoder, programs, slots, left, mine)
            done.update((task.number, number) for task, number in left.values())


def finished_rows(
    encoder: Encoder, programs: Programs, slots: Slots, left: dict[int, tuple[Task, int]], mine: set[int]
) -> Finished:
    """Takes finished answers out of their slots.

    Args:
      left: slot -> whose answer it holds, and the answer's number.
      mine: slots whose answers this host makes rows of.
    """
    ids, lengths, logps = (np.asarray(values) for values in programs.sampler.read(slots))
    check_finite(logps[list(left)], "log-probabilities")
    rows = []
    for slot, (task, number) in left.items():
        if slot in mine:
            answer = encoder.sampled(ids[slot, : lengths[slot]].tolist())
            ended = bool(answer.ids) and answer.ids[-1] in encoder.chat.stop_ids
            rows.append(
                {
                    "prompt_number": task.number,
                    "sample": number,
                    **answer_row(task.prompt, answer),
                    "stop": "eos" if ended else "length",
                    "logprob": float(logps[slot]),
                }
            )
    return Finished(len(left), int(lengths[list(left)].sum()), rows)


def sample_rows(
    encoder: Encoder, programs: Programs, params: Any, prompts: Sequence[Numbered], **settings: Any
) -> list[dict[str, Any]]:
    """Samples responses to all prompts; one row per response, in order.

    Args:
      settings: those of `sample`.
    """
    place = {number: i for i, (number, _) in enumerate(prompts)}
    rows = [row for found in sample(encoder, programs, params, prompts, **settings) for row in found.rows]
    return sorted(rows, key=lambda row: (place[row["prompt_number"]], row["sample"]))


class _Desk:
    """Gives free slots to waiting prompts; all hosts decide alike."""

    def __init__(
        self,
        encoder: Encoder,
        programs: Programs,
        prompts: Sequence[Numbered],
        responses: int,
        done: set[tuple[int, int]],
    ):
        self._spec, self._pad_id, self._share = programs.slot_spec, encoder.chat.pad_id, programs.local_rows
        self._each = self._spec.slots // self._spec.devices
        self._free = [list(range(d * self._each, (d + 1) * self._each)) for d in range(self._spec.devices)]
        self.running: dict[int, tuple[Task, int]] = {}
        tasks = []
        for number, prompt in prompts:
            asked = [n for n in range(responses) if (number, n) not in done]
            tasks += [Task(number, prompt, tuple(part)) for part in batched(asked, self._each)]
        # Prompts of one compiled length come in together: the length depends on the prompt alone.
        self._waiting: dict[int, deque[Task]] = {tokens: deque() for tokens in self._spec.tokens}
        for task in tasks:
            self._waiting[next(tokens for tokens in self._spec.tokens if tokens >= len(task.prompt.ids))].append(task)

    @property
    def waiting(self) -> bool:
        return any(self._waiting.values())

    @property
    def until(self) -> int:
        """How many free slots are worth a look: those for the prompts of the next admission, all where none waits."""
        if not self.waiting:
            return self._spec.slots
        answers = sum(len(task.answers) for task in islice(self._waiting[self._next], self._spec.prompts))
        # More than are free now, since they are not enough for some device.
        return min(max(answers, self._spec.slots - len(self.running) + 1), self._spec.slots)

    @property
    def _next(self) -> int:
        """The length of prompts of which most wait."""
        return max(self._waiting, key=lambda tokens: len(self._waiting[tokens]))

    def admission(self):
        """Takes prompts in -> what the sampler is told; None where there is no room for all that a call could take."""
        spec, together, tokens = self._spec, self._spec.prompts // self._spec.devices, self._next
        queue, coming, room = self._waiting[tokens], [], [len(free) for free in self._free]
        counts = [0] * spec.devices
        for task in islice(queue, spec.prompts):
            devices = [d for d in range(spec.devices) if counts[d] < together and room[d] >= len(task.answers)]
            if not devices:
                break
            device = max(devices, key=lambda d: room[d])
            coming.append((device, counts[device], task))
            counts[device] += 1
            room[device] -= len(task.answers)
        if not coming or (len(coming) < min(spec.prompts, len(queue)) and self.running):
            return None
        prompts: list[tuple[int, Sequence[int]] | None] = [None] * spec.prompts
        answers = {}
        for device, place, task in coming:
            queue.popleft()
            prompts[device * together + place] = (task.number, task.prompt.ids)
            for number in task.answers:
                slot = self._free[device].pop()
                answers[slot] = (place, number)
                self.running[slot] = (task, number)
        return spec.arrays(tokens, prompts, answers, self._pad_id, self._share)

    def leave(self, slots: Sequence[int]) -> dict[int, tuple[Task, int]]:
        """Frees slots -> whose answers they hold."""
        for slot in slots:
            self._free[slot // self._each].append(slot)
        return {slot: self.running.pop(slot) for slot in slots}


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
    account: Account | None = None,
    resumable: bool = True,
) -> None:
    """Writes responses to `path`, every host its share. An interrupted file goes on with the prompts that are not done.

    Args:
      account: of the stage, where there is one.
      resumable: what Ctrl-C says: whether the same command goes on or starts again.
    """
    place = {number: i for i, (number, _) in enumerate(prompts)}
    done = set(hosts.decide(lambda: _gather_parts(path, place, responses)))
    sync(path)
    partial = AppendOnly(_part(path, hosts.index()))
    left = [(number, prompt) for number, prompt in prompts if number not in done]
    started, tokens, answers = time.monotonic(), 0, 0
    with console.stage(title, len(prompts) * responses, len(done) * responses) as bar:
        stopper.check(title, resumable=resumable)
        for found in sample(
            encoder, programs, params, left, responses=responses, sampling=sampling, key=key, owned=True
        ):
            _keep(partial, found.rows)
            save(path, SAVE_SECONDS)
            tokens, answers = tokens + found.tokens, answers + found.answers
            rate = tokens / (time.monotonic() - started)
            bar.advance(f"{rate:,.0f} tokens/s, {tokens / answers:.0f} per answer", by=found.answers)
            stopper.check(title, resumable=resumable)
    partial.close()
    sync(path)
    if hosts.first():
        _gather_parts(path, place, responses)
        if account is not None:
            # What a process before this one sampled counts too.
            account.add(costs.sampled(programs, AppendOnly(_part(path, 0)).rows()))
            account.keep()
        _part(path, 0).replace(path)
    sync(path)


def _keep(partial: AppendOnly, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        partial.write(row)
    partial.sync()


def parts(path: Path) -> list[Path]:
    """Lists what hosts wrote of a file that is not whole yet, the first host's part first."""
    first = _part(path, 0)
    others = sorted(path.parent.glob(f"{glob.escape(first.name)}-[0-9]*"))
    return [first, *others] if first.exists() else others


def _part(path: Path, host: int) -> Path:
    return path.with_name(f"{path.name}.partial" + (f"-{host}" if host else ""))


def _gather_parts(path: Path, place: dict[int, int], responses: int) -> list[int]:
    """Puts what hosts wrote of whole prompts, perhaps others than now, into the first one's part, in order.

    Returns:
      The numbers of the prompts all of whose answers are there.
    """
    first = AppendOnly(_part(path, 0))
    parts_found = parts(path)
    found = [row for part in parts_found for row in AppendOnly(part).rows() if row["prompt_number"] in place]
    # A process that ended between writing the first part and removing the others left the same rows in both.
    by_place = {(place[row["prompt_number"]], row["sample"]): row for row in found}
    counts = Counter(prompt for prompt, _ in by_place)
    whole = [key for key in sorted(by_place) if counts[key[0]] == responses]
    first.rewrite([by_place[key] for key in whole])
    for part in parts_found:
        if part != first.path:
            part.unlink()
    numbers = {i: number for number, i in place.items()}
    return [numbers[i] for i in dict.fromkeys(prompt for prompt, _ in whole)]


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
    account: Account,
) -> None:
    """Writes responses.jsonl of an iteration.

    Args:
      params: parameters of M_t.
      prompts: those of the iteration.
      account: of the stage.
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
        account=account,
    )
