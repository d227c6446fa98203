"""Answers from a command of the user's: another engine samples, and its file is checked before it takes its place."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.config.files import BUNDLED
from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder
from scir_jax.data.jsonl import write_rows
from scir_jax.data.messages import prompt_text
from scir_jax.data.pairs import answer_row
from scir_jax.engine.hosts import hosts, liveness
from scir_jax.engine.programs import Programs
from scir_jax.errors import InputError
from scir_jax.run import answers, console, costs, scoring
from scir_jax.run.answers import Source
from scir_jax.run.costs import Account
from scir_jax.run.directory import RunDirectory
from scir_jax.run.export import export_model
from scir_jax.run.models import Models
from scir_jax.run.sampling import Numbered

CHECKED = 64
"""answers whose log-probabilities are compared with this model's own"""
LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 10.0
"""that a command which is stopped has to end by itself"""
SHOWN_LINES = 15


def sample_with_command(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    models: Models,
    directory: RunDirectory,
    prompts: Sequence[Numbered],
    iteration: int,
    path: Path,
    stopper: console.Stopper,
    account: Account,
) -> None:
    """Writes responses.jsonl of an iteration with the answers that `sample.command` gives.

    The model and the prompts lie in a directory of their own while the command runs. What it writes becomes
    responses.jsonl when it is complete and right, and not before; where it is wrong it stays to be looked at. All hosts
    call this; the first one runs the command, and the others wait and read what it wrote.

    Args:
      account: of the stage; the answers count as if the run's own sampler had given them.

    Raises:
      InputError: the command fails, or its answers are not those that were asked for.
      Interrupted: on Ctrl-C or SIGTERM; the command is stopped.
    """
    folder = path.parent / "command"
    log = path.parent / "command.log"
    model, asked, output = folder / "model", folder / "prompts.jsonl", folder / "responses.jsonl"
    if hosts.first():
        # What a process that was killed left.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    title, count = f"iteration {iteration}: sample", len(prompts) * config.sample.responses
    with _left(folder, output) if hosts.first() else contextlib.nullcontext():
        if hosts.first():
            write_rows(asked, map(prompt_row, prompts))
        if "{model}" in config.sample.command:
            models.release()
            export_model(config, programs, directory, iteration, model)
        with console.stage(title, count) as bar:
            run(filled(config, encoder, iteration, model, asked, output), log, output, bar, stopper, title)
        if hosts.first():
            shutil.rmtree(model, ignore_errors=True)

        def read() -> tuple[Source, list[int]]:
            source = answers.sampled_answers(encoder, programs.facts.lengths, programs.arch.vocab_size, output)
            return source, check_complete(source, prompts, config.sample.responses, output)

        source, numbers = hosts.together(read)
        _check_claims(encoder, programs, models, iteration, source, account)
        account.add(costs.sampled(programs, _rows(encoder, source, numbers)))
        account.keep()
        if hosts.first():
            write_rows(path, _rows(encoder, source, numbers))
            output.unlink()


def prompt_row(numbered: Numbered) -> dict[str, Any]:
    """Returns the row of a prompt in the file that the command is given."""
    number, prompt = numbered
    return {
        "prompt_number": number,
        "prompt": prompt_text(prompt.messages),
        "messages": prompt.messages,
        "prompt_ids": list(prompt.ids),
        "prompt_quote_ids": list(prompt.quote),
    }


def filled(config: Config, encoder: Encoder, iteration: int, model: Path, prompts: Path, output: Path) -> str:
    """Returns the command with its places filled, each quoted for the shell; other braces stay as they are."""
    sample = config.sample
    seed = int(np.random.SeedSequence([config.run.seed, 4, iteration]).generate_state(1)[0]) & 0x7FFFFFFF
    values = {
        "model": model.absolute(),
        "prompts": prompts.absolute(),
        "output": output.absolute(),
        "engines": BUNDLED / "engines",
        "responses": sample.responses,
        "temperature": sample.temperature,
        "top_p": sample.top_p,
        "top_k": sample.top_k,
        "max_tokens": config.text.max_response_tokens,
        "stop_ids": ",".join(map(str, encoder.chat.stop_ids)),
        "seed": seed,
    }
    pattern = re.compile("{(" + "|".join(values) + ")}")
    return pattern.sub(lambda place: shlex.quote(str(values[place[1]])), sample.command)


def run(command: str, log: Path, output: Path, bar: console.Bar, stopper: console.Stopper, title: str) -> None:
    """Runs a shell command on the first host, and waits for it on all; the bar shows the lines of `output`.

    Args:
      log: what the command prints goes there.

    Raises:
      InputError: it fails, or writes no output; its last lines are printed before.
      Interrupted: on Ctrl-C or SIGTERM.
    """
    with _running(command, log) if hosts.first() else contextlib.nullcontext() as process:
        at = 0

        def look() -> tuple[bool, int, int]:
            """Waits a moment -> whether the command has ended well, bytes and lines of the output since the last look."""
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_SECONDS * (1 if hosts.count() == 1 else 5))
            if process.returncode:
                raise InputError(_failed(process.returncode, log))
            new = b""
            if output.is_file():
                with output.open("rb") as file:
                    file.seek(at)
                    new = file.read()
            elif process.returncode == 0:
                raise InputError(
                    f"sample.command ended well but wrote no {{output}} ({output}); its lines are in {log}"
                )
            return process.returncode == 0, len(new), new.count(b"\n")

        ended = False
        while not ended:
            ended, size, rows = hosts.decide(look)
            at += size
            bar.advance(by=rows)
            if not ended:
                stopper.check(title)


@contextlib.contextmanager
def _running(command: str, log: Path) -> Iterator[subprocess.Popen]:
    """Starts a shell command; at the end of the block, or of this process for the loss of a host, it ends."""
    with log.open("wb") as lines:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=lines, stderr=lines, start_new_session=True
        )
        try:
            with liveness.ends_with_us(process.pid):
                yield process
        finally:
            _end(process)


def _failed(code: int, log: Path) -> str:
    """Shows a failed command's last lines -> the sentence for its exit code, negative for a signal."""
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    for line in last:
        console.say(f"  | {line}")
    how = f"was ended by signal {-code}" if code < 0 else f"exit code {code}"
    return (
        f"sample.command failed ({how}); "
        f"{'its last lines are above, all of them' if last else 'what it printed is'} in {log}: "
        "mend it and run the same command again"
    )


def check_complete(source: Source, prompts: Sequence[Numbered], responses: int, path: Path) -> list[int]:
    """Checks that each prompt has as many answers as were asked for -> the number of each item's prompt.

    Raises:
      InputError: an answer is missing or too many, or belongs to no prompt.
    """
    # Two rows of a file of prompts may be the same text.
    waiting: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in prompts:
        waiting.setdefault(prompt.ids, []).append(number)
    found = Counter(prompt.ids for prompt, _ in source.items)
    for prompt, _ in source.items:
        if prompt.ids not in waiting:
            raise InputError(f"{prompt.where}: answers a prompt that is not in {{prompts}}")
    for number, prompt in prompts:
        expected = responses * len(waiting[prompt.ids])
        if found[prompt.ids] != expected:
            raise InputError(
                f"{path}: {found[prompt.ids]} answers to the prompt with prompt_number {number} ({prompt.where}), but "
                f"sample.responses asks for {expected}; the command must answer every prompt"
            )
    given: Counter = Counter()
    numbers = []
    for prompt, _ in source.items:
        numbers.append(waiting[prompt.ids][given[prompt.ids] // responses])
        given[prompt.ids] += 1
    return numbers


def _check_claims(
    encoder: Encoder, programs: Programs, models: Models, iteration: int, source: Source, account: Account
) -> None:
    """Compares the log-probabilities of a sample of answers with those of M_t."""
    step = max(len(source.claims) // CHECKED, 1)
    claims = source.claims[::step][:CHECKED]
    if not claims:
        return
    logps = np.full(len(source.items), np.nan)
    items = [source.items[claim.item] for claim in claims]
    scored = scoring.score_answers(encoder, programs, models.load(iteration), items, spend=account.add)["logps"]
    logps[[claim.item for claim in claims]] = scored
    far = hosts.together(lambda: answers.check_claims(claims, source.items, logps))
    console.say(
        f"sample.command: log-probabilities of {len(claims)} answers are {far:.1g} nats per token from this model's "
        "(median)"
    )


def _rows(encoder: Encoder, source: Source, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the rows of responses.jsonl, in order of prompt and answer."""
    logprobs = {claim.item: claim.logprob for claim in source.claims}
    counts: Counter = Counter()
    for i in sorted(range(len(numbers)), key=lambda i: numbers[i]):
        prompt, answer = source.items[i]
        ended = bool(answer.ids) and answer.ids[-1] in encoder.chat.stop_ids
        row = {"prompt_number": numbers[i], "sample": counts[numbers[i]], **answer_row(prompt, answer)}
        counts[numbers[i]] += 1
        claimed = {"logprob": logprobs[i]} if i in logprobs else {}
        yield {**row, "stop": "eos" if ended else "length", **claimed}


@contextlib.contextmanager
def _left(folder: Path, output: Path) -> Iterator[None]:
    """Removes everything of a command's directory but an output that could not be used, which the error names."""
    try:
        yield
    finally:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != output:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _end(process: subprocess.Popen) -> None:
    """Ends a command with all that it started, which may outlive it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_SECONDS)
            return
