"""The stage that constructs pairs of known order from an iteration's answers, which teach the judge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from scir_jax.config.schema import Config
from scir_jax.data.encode import Encoder, Marked
from scir_jax.data.files import read_rows
from scir_jax.data.jsonl import write_rows
from scir_jax.data.pairs import Answer, Pair, Prompt, from_row, to_row
from scir_jax.data.tally import PromptTooLong
from scir_jax.engine.hosts import hosts
from scir_jax.engine.programs import Programs
from scir_jax.engine.sampler import stream_key
from scir_jax.errors import InputError
from scir_jax.method.constructed import construct
from scir_jax.run import console, costs, sampling
from scir_jax.run.answers import Source
from scir_jax.run.costs import Account
from scir_jax.run.models import Models
from scir_jax.run.pairing import different

NAME = "constructed.jsonl"
_WORD = re.compile(r"\S+")


def construct_pairs(
    config: Config,
    encoder: Encoder,
    programs: Programs,
    models: Models,
    iteration: int,
    source: Source,
    path: Path,
    stopper: console.Stopper,
    account: Account,
) -> None:
    """Writes constructed.jsonl: pairs whose first answer is the better one by construction.

    Args:
      account: of the stage.

    Raises:
      InputError: no pair can be constructed.
    """
    items = source.items
    groups = different(items)
    prompts = [set(items[group[0]][0].ids) for group in groups]
    rng = np.random.default_rng(np.random.SeedSequence([config.run.seed, 3, iteration]))
    found = construct(groups, prompts, config.judge.constructions, rng)
    worse: list[Answer | None] = [None] * len(found)
    asked: list[tuple[int, Prompt]] = []
    sampled: list[dict[str, Any]] = []
    for number, pair in enumerate(found):
        prompt, answer = items[pair.better]
        if pair.worse is not None:
            worse[number] = items[pair.worse][1]
        elif pair.kind == "cut":
            worse[number] = first_half(encoder, answer)
        else:
            other = items[rng.integers(len(items))][0]
            changed = changed_prompt(encoder, prompt, other, pair.kind, rng)
            if changed is not None and len(changed.ids) <= programs.facts.lengths.prompt:
                asked.append((number, changed))
    if asked:
        title = f"iteration {iteration}: answers to changed prompts"
        params, key = models.load(iteration), stream_key(config.run.seed, "constructed", iteration)
        with console.stage(title, len(asked)) as bar:
            how = sampling.settings_of(config.sample)
            for some in sampling.sample(encoder, programs, params, asked, responses=1, sampling=how, key=key):
                sampled += some.rows
                for row in some.rows:
                    worse[row["prompt_number"]] = encoder.sampled(row["response_ids"])
                bar.advance(by=some.answers)
                stopper.check(title)
    rows = []
    for pair, other in zip(found, worse, strict=True):
        prompt, answer = items[pair.better]
        if other is not None and other.quote and other.quote != answer.quote:
            row = to_row(Pair(prompt, answer, other, label=1.0), len(rows))
            rows.append({**row, "construction": pair.kind})
    if not rows:
        raise InputError(
            f"iteration {iteration}: no pair can be constructed of the responses, which are all alike or of one token; "
            "set judge.constructions to others, or judge.constructed_batch_size to 0"
        )
    account.add(costs.sampled(programs, sampled))
    account.keep()
    if hosts.first():
        write_rows(path, rows)


def first_half(encoder: Encoder, answer: Answer) -> Answer:
    """Returns the first half of an answer, without a stop token."""
    ended = bool(answer.ids) and answer.ids[-1] in encoder.chat.stop_ids
    return encoder.sampled(answer.ids[: (len(answer.ids) - ended) // 2])


def changed_prompt(
    encoder: Encoder, prompt: Prompt, other: Prompt, kind: str, rng: np.random.Generator
) -> Prompt | None:
    """Changes the last message of a prompt.

    Args:
      other: gives a word to a perturbed prompt.
      kind: "truncated": its second half is left out, of its words or, where it is one word, of its letters; "perturbed":
        one of its words is exchanged for the other's at the same place (the last one where that is shorter).

    Returns:
      The changed prompt; None where nothing is left, nothing is changed, or it is too long.
    """
    text = prompt.messages[-1]["content"]
    words = list(_WORD.finditer(text))
    if kind == "truncated":
        changed = text[: words[len(words) // 2].start()].rstrip() if len(words) > 1 else text[: len(text) // 2]
    else:
        place, theirs = int(rng.integers(len(words))), _WORD.findall(other.messages[-1]["content"])
        old, new = words[place], theirs[min(place, len(theirs) - 1)]
        changed = text[: old.start()] + new + text[old.end() :]
    if not changed.strip() or changed == text:
        return None
    try:
        return encoder.prompt([*prompt.messages[:-1], {**prompt.messages[-1], "content": changed}], prompt.where)
    except PromptTooLong:
        return None


def constructed_rows(encoder: Encoder, path: Path) -> list[Marked]:
    """Returns the judge's questions about an iteration's constructed pairs, in both orders, with the right verdicts.

    Raises:
      InputError: a row is bad.
    """
    pairs = [from_row(row, where) for where, row in read_rows(path)]
    return [row for judge in encoder.judges for pair in pairs for row in encoder.verdict_rows(judge, pair)]
