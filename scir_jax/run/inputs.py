"""The data files of a run: each read once, encoded once, and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from scir_jax.config.schema import Config
from scir_jax.data import records, statistics
from scir_jax.data.encode import Encoder, Lengths, Marked
from scir_jax.data.pairs import Pair, Prompt
from scir_jax.data.statistics import FileStatistics
from scir_jax.data.tally import Tally
from scir_jax.errors import InputError
from scir_jax.run import console

SHOW_PROGRESS = 20_000
"""rows from which on encoding a file has a progress bar"""


class Conversations(NamedTuple):
    """The rows of data.ift, and the numbers of tokens of each conversation and of its answers before the cut."""

    rows: list[Marked]
    tokens: list[int]
    answers: list[int]


class Inputs:
    """Prompts, conversations and pairs of the configuration's files, each read when it is first asked for.

    Reading one that cannot be used raises InputError.

    Attributes:
      tallies: key of the configuration -> what became of the file's rows, for the files that were read so far.
    """

    def __init__(self, config: Config, encoder: Encoder):
        self.config = config
        self.encoder = encoder
        self.tallies: dict[str, Tally] = {}

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts to train on."""
        return self._divided[0]

    @cached_property
    def heldout_prompts(self) -> list[Prompt]:
        """The prompts to evaluate on: a file's, or those that data.holdout keeps from training."""
        return self._prompts("heldout_prompts") if self.config.data.heldout_prompts else self._divided[1]

    @cached_property
    def _divided(self) -> tuple[list[Prompt], list[Prompt]]:
        """The rows of data.prompts for training, and those held out: evenly over the file, each prompt on one side."""
        prompts, count = self._prompts("prompts"), self.config.data.holdout
        if not count or not prompts:
            return prompts, []
        if count >= len(prompts):
            raise InputError(
                f"data.holdout {count} leaves nothing of the {len(prompts)} prompts of {self.config.data.prompts} to "
                "train on"
            )
        held = {prompts[len(prompts) * i // count].ids for i in range(count)}
        return [p for p in prompts if p.ids not in held], [p for p in prompts if p.ids in held]

    @cached_property
    def heldout_pairs(self) -> list[Pair]:
        return self._pairs("heldout_pairs", need_label=True)

    @cached_property
    def given_pairs(self) -> list[Pair]:
        external = self.config.preference.labels == "external"
        return self._pairs("pairs", need_label=external and not self.config.pairs.scorer)

    @cached_property
    def eft(self) -> list[Pair]:
        """Judging examples without ties, which teach a judge nothing."""
        return self._pairs("eft", need_label=True, ties=False)

    @cached_property
    def conversations(self) -> Conversations:
        """Conversations as far as the model's context holds them."""
        result = Conversations([], [], [])
        path = self.config.data.ift
        if not path:
            return result
        tally = self.tally("ift", path)
        context = self.encoder.context
        for where, messages in _watched("ift", records.read_conversations(path, self.config.data.columns, tally)):
            with tally.row(where):
                found = self.encoder.conversation_rows(messages)
                kept = [
                    Marked(row.ids[:context], row.marks[:context], where) for row in found if any(row.marks[:context])
                ]
                if kept:
                    result.rows.extend(kept)
                    result.tokens.append(max(len(row.ids) for row in found))
                    result.answers.append(sum(sum(row.marks) for row in found))
                else:
                    tally.leave_out(f"no answer begins within the model's context of {context}")
        tally.finish(len(result.tokens))
        return result

    @cached_property
    def targets(self) -> dict[str, list[Marked]]:
        """Supervised rows by name: "ift" conversations; "eft" questions under every template, both orders together."""
        encoder = self.encoder
        eft = [row for judge in encoder.judges for pair in self.eft for row in encoder.verdict_rows(judge, pair)]
        return {"ift": self.conversations.rows, "eft": eft}

    @cached_property
    def present(self) -> frozenset[str]:
        """Keys of `data` with rows in them, of those that decide which programs there are."""
        found = {**self.targets, "heldout_prompts": self.heldout_prompts, "heldout_pairs": self.heldout_pairs}
        return frozenset(key for key, rows in found.items() if rows)

    @cached_property
    def lengths(self) -> Lengths:
        """The static lengths, from all files."""
        prompts = [*self.prompts, *self.heldout_prompts]
        prompts += (pair.prompt for pairs in (self.heldout_pairs, self.given_pairs, self.eft) for pair in pairs)
        if not prompts:
            raise InputError("no prompts: give --prompts FILE (data.prompts), or data.pairs")
        self.encoder.lengths(prompts)  # refuses what does not fit, before rows are made of it
        longest = {name: max((len(row.ids) for row in rows), default=0) for name, rows in self.targets.items()}
        learned = {name: max((sum(row.marks[1:]) for row in rows), default=0) for name, rows in self.targets.items()}
        return self.encoder.lengths(prompts, longest, learned)

    def tally(self, key: str, path: str) -> Tally:
        """Begins to count a file's rows."""
        self.tallies[key] = Tally(path, self.config.data.on_bad_row, self.config.data.max_bad_rows)
        return self.tallies[key]

    def encode_pairs(self, key: str, comparisons: Sequence[records.Comparison], *, ties: bool = True) -> list[Pair]:
        """Encodes the pairs of a file that `tally(key, path)` counts.

        Args:
          ties: keep pairs of which neither answer is better.

        Raises:
          InputError: the file has bad rows that its tally does not allow, or no pair is left.
        """
        tally = self.tallies[key]
        pairs = []
        for comparison in _watched(key, comparisons):
            with tally.row(comparison.where):
                if not ties and comparison.label == 0.5:
                    tally.leave_out("tie (label 0.5)")
                elif pair := self.encoder.pair(comparison):
                    pairs.append(pair)
                else:
                    tally.leave_out(self._too_long)
        tally.finish(len(pairs))
        return pairs

    # --- statistics -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, FileStatistics]:
        """Describes every file, by key of the configuration; reads those that were not read yet."""
        lengths, targets, conversations = self.lengths, self.targets, self.conversations
        context = self.encoder.context
        files = {
            "prompts": _of_prompts([p for part in self._divided for p in part], lengths.prompt),
            "ift": {
                "prompts": [n - answers for n, answers in zip(conversations.tokens, conversations.answers)],
                "answers": conversations.answers,
                "prompts_cut": 0,
                "answers_cut": sum(tokens > context for tokens in conversations.tokens),
                "rows": [len(row.ids) for row in targets["ift"]],
                "row_tokens": lengths.targets["ift"],
            },
            "eft": _of_pairs(self.eft, lengths.targets["eft"]) | {"rows": [len(row.ids) for row in targets["eft"]]},
            "pairs": _of_pairs(self.given_pairs, lengths.scored),
            "heldout_prompts": _of_prompts(self.heldout_prompts, lengths.prompt),
            "heldout_pairs": _of_pairs(self.heldout_pairs, lengths.scored),
        }
        return {key: FileStatistics(self.tallies[key], **file) for key, file in files.items() if key in self.tallies}

    def to_dict(self) -> dict[str, Any]:
        """Returns the statistics and the run's static lengths, as data.json has them."""
        files = {key: file.to_dict() for key, file in self.statistics().items()}
        return {"files": files, "lengths": dataclasses.asdict(self.lengths)}

    def tell_left_out(self) -> None:
        """Says which rows of the files read so far were left out, and why."""
        for sentence in statistics.left_out(self.tallies):
            console.say(sentence)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _prompts(self, key: str) -> list[Prompt]:
        path = getattr(self.config.data, key)
        if not path:
            return []
        tally = self.tally(key, path)
        prompts = []
        for where, messages in _watched(key, records.read_prompts(path, self.config.data.columns, tally)):
            with tally.row(where):
                if prompt := self.encoder.prompt(messages, where):
                    prompts.append(prompt)
                else:
                    tally.leave_out(self._too_long)
        tally.finish(len(prompts))
        return prompts

    def _pairs(self, key: str, *, need_label: bool, ties: bool = True) -> list[Pair]:
        path = getattr(self.config.data, key)
        if not path:
            return []
        columns = self.config.data.columns
        comparisons = records.read_comparisons(path, columns, self.tally(key, path), need_label=need_label)
        return self.encode_pairs(key, comparisons, ties=ties)

    @property
    def _too_long(self) -> str:
        return f"prompt longer than text.max_prompt_tokens={self.config.text.max_prompt_tokens}"


def _of_prompts(prompts: Sequence[Prompt], row_tokens: int) -> dict[str, Any]:
    return {
        "prompts": [p.tokens for p in prompts],
        "answers": [],
        "prompts_cut": sum(p.cut for p in prompts),
        "answers_cut": 0,
        "rows": [len(p.ids) for p in prompts],
        "row_tokens": row_tokens,
    }


def _of_pairs(pairs: Sequence[Pair], row_tokens: int) -> dict[str, Any]:
    answers = [y for pair in pairs for y in pair.answers]
    return _of_prompts([pair.prompt for pair in pairs], row_tokens) | {
        "answers": [y.tokens for y in answers],
        "answers_cut": sum(y.cut for y in answers),
        "rows": [len(pair.prompt.ids) + length for pair in pairs for length in pair.lengths],
    }


def _watched(key: str, items: Sequence) -> Iterator:
    """Yields the items, with a progress bar where they are many."""
    if len(items) < SHOW_PROGRESS:
        yield from items
        return
    with console.stage(f"tokens of data.{key}", len(items)) as bar:
        for number, item in enumerate(items):
            yield item
            if number % 1000 == 999:
                bar.advance(by=1000)
