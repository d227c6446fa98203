"""The answers of an iteration's file: our own, or another engine's, which are checked against what this model says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scir_jax.data import records
from scir_jax.data.encode import Encoder, Lengths
from scir_jax.data.files import read_rows
from scir_jax.data.messages import answer_text, prompt_messages
from scir_jax.data.pairs import Answer, Prompt, token_ids
from scir_jax.data.tally import Tally
from scir_jax.errors import InputError
from scir_jax.method.pairing import Choice
from scir_jax.run.scoring import Item

FAR = 0.1
"""nats per token: log-probabilities in bfloat16 differ by a tenth of this, those of another model by more"""


class Claim(NamedTuple):
    """What another engine says of an answer.

    Attributes:
      item: the answer's place among the items.
      logprob: log pi(y|x), nats, summed over the answer's tokens.
      where: names the row.
    """

    item: int
    logprob: float
    where: str


class Source(NamedTuple):
    """What pairs are made of.

    Attributes:
      items: prompts and answers.
      given: pairs of places in `items` that are taken as they are; None: they are chosen as pairs.kind says.
      claims: log-probabilities that another engine gives beside its ids.
    """

    items: list[Item]
    given: list[Choice] | None = None
    claims: tuple[Claim, ...] = ()


def sampled_answers(encoder: Encoder, lengths: Lengths, vocabulary: int, path: Path) -> Source:
    """Reads the answers of an iteration's file, our own or another engine's (then `prompt` and `response` are enough).

    Ids that the file holds are taken as they are; only what it lacks is tokenised. Another engine's ids are checked
    against the texts beside them.

    Args:
      lengths: static lengths of the run, which prompts must not exceed.
      vocabulary: size of the model's.

    Raises:
      InputError: a row is bad, or its ids are of another tokenizer; its file and line are named.
    """
    limit = encoder.config.max_response_tokens
    items: list[Item] = []
    claims: list[Claim] = []
    unended: str | None = None
    ended = False
    prompts: dict[str, Prompt | None] = {}
    tally = Tally(str(path))
    for where, row in read_rows(path):
        given = row.get("messages", records.need(row, "prompt", where))
        name = str(given)
        # Rows that this program wrote have the quotes' ids too.
        foreign = "response_ids" in row and "quote_ids" not in row
        if name not in prompts:
            with tally.row(where):
                messages = prompt_messages(given, f"{where}: prompt")
                if "prompt_ids" in row and "prompt_quote_ids" in row:
                    ids, quote = (
                        token_ids(row[key], f"{where}: {key}", vocabulary) for key in ("prompt_ids", "prompt_quote_ids")
                    )
                    prompts[name] = Prompt(messages, ids, quote, where, len(ids))
                else:
                    prompts[name] = encoder.prompt(messages, where)
                if foreign:
                    _check_prompt(encoder, row, messages, vocabulary, where)
                _check_length(prompts[name], lengths, where)
        prompt = prompts[name]
        if prompt is None:
            continue
        if "response_ids" not in row:
            text = records.need(row, "response", where)
            answer = encoder.answer(answer_text(text, f"{where}: response"))
        elif foreign:
            ids = token_ids(row["response_ids"], f"{where}: response_ids", vocabulary)
            _check_text(encoder, row, ids, where)
            answer = encoder.sampled(ids[:limit])
            if len(ids) <= limit and row.get("logprob") is not None:
                claims.append(Claim(len(items), _logprob(row["logprob"], f"{where}: logprob"), where))
            if ids and ids[-1] in encoder.chat.stop_ids:
                ended = True
            elif len(ids) < limit and row.get("stop") != "length":
                unended = unended or where
        else:
            ids, quote = (
                token_ids(row[key], f"{where}: {key}", vocabulary)[:limit] for key in ("response_ids", "quote_ids")
            )
            answer = Answer(records.need(row, "response", where), ids, quote, len(ids))
        items.append((prompt, answer))
    if unended and not ended:
        stops = ", ".join(map(str, encoder.chat.stop_ids))
        raise InputError(
            f"{unended}: response_ids ends before text.max_response_tokens without a stop token ({stops}), as all rows "
            "do: the engine leaves it out, and the model would never learn to stop; let the engine keep it"
        )
    return Source(items, claims=tuple(claims))


def check_claims(claims: Sequence[Claim], items: Sequence[Item], logps: np.ndarray) -> float | None:
    """Compares another engine's log-probabilities with this model's own.

    Args:
      logps: [items] log pi(y|x) under M_t, nats; NaN for answers that were not scored.

    Returns:
      The median difference, nats per token; None where nothing can be compared.

    Raises:
      InputError: the engine read other tokens or computed with another model; the row that is furthest off is named.
    """
    found = [
        (abs(claim.logprob - logps[claim.item]) / max(len(items[claim.item][1].ids), 1), claim)
        for claim in claims
        if np.isfinite(logps[claim.item])
    ]
    if not found:
        return None
    median = float(np.median([far for far, _ in found]))
    if median > FAR:
        far, claim = max(found, key=lambda item: item[0])
        raise InputError(
            f"{claim.where}: the engine gives this answer the log-probability {claim.logprob:.4g}, this model "
            f"{logps[claim.item]:.4g} ({far:.2g} nats per token apart, the median over {len(found)} rows is "
            f"{median:.2g}): the engine has another model, tokenizer or prompt, or gives log-probabilities at another "
            "temperature than 1"
        )
    return median


def _check_prompt(encoder: Encoder, row: dict[str, Any], messages: list, vocabulary: int, where: str) -> None:
    """Compares a row's prompt_ids with what this model's chat template and tokenizer make of its messages."""
    if "prompt_ids" not in row:
        return
    expected = encoder.prompt(messages, where)
    theirs = token_ids(row["prompt_ids"], f"{where}: prompt_ids", vocabulary)
    if expected is not None and theirs != expected.ids:
        place = next((i for i, pair in enumerate(zip(theirs, expected.ids)) if pair[0] != pair[1]), None)
        place = min(len(theirs), len(expected.ids)) if place is None else place
        raise InputError(
            f"{where}: prompt_ids are not what this model's tokenizer and chat template give from token {place + 1} "
            "on: the engine has another tokenizer, or applied a chat template twice; answer the prompt_ids as they "
            "are given"
        )


def _check_text(encoder: Encoder, row: dict[str, Any], ids: Sequence[int], where: str) -> None:
    """Compares the text of a row with its ids, but for spaces, control tokens and broken characters."""
    if not isinstance(row.get("response"), str):
        return

    def plain(text: str) -> str:
        return "".join(text.split()).replace("\ufffd", "")

    tokenizer, theirs = encoder.chat.tokenizer, plain(row["response"])
    readings = [
        encoder.chat.decode(ids),
        tokenizer.decode(list(ids)),
        tokenizer.decode(list(ids), skip_special_tokens=True),
    ]
    if theirs not in map(plain, readings):
        raise InputError(
            f"{where}: response_ids read {_short(readings[0])} with this model's tokenizer, but response is "
            f"{_short(row['response'])}: the engine has another tokenizer"
        )


def _short(text: str) -> str:
    return repr(text if len(text) < 40 else text[:40] + "...")


def _logprob(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= 0:
        raise InputError(f"{where}: must be the sum of log-probabilities, a number of at most 0, not {value!r}")
    return float(value)


def _check_length(prompt: Prompt | None, lengths: Lengths, where: str) -> None:
    for tokens, most in ((len(prompt.ids), lengths.prompt), (len(prompt.quote), lengths.quote)) if prompt else ():
        if tokens > most:
            raise InputError(
                f"{where}: the prompt has {tokens} tokens, but the longest of this run's data has {most}, for which "
                "its programs are compiled; answer the prompts of data.prompts"
            )
