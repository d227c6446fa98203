"""The data files of a run: each read once, encoded once, and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from scir_jax.config import Config
from scir_jax.data import records, statistics
from scir_jax.data.encode import EncodedPair, Encoder, Prompt, Shapes
from scir_jax.data.statistics import FileStatistics
from scir_jax.data.tally import Tally
from scir_jax.errors import InputError
from scir_jax.loop import console
from scir_jax.text.chat import Ids

MarkedIds = tuple[Ids, tuple[bool, ...]]
SHOW_PROGRESS = 20_000
"""rows from which on encoding a file has a progress bar"""


class Inputs:
    """Prompts, conversations and pairs of the configuration's files. InputError where one cannot be used.

    Attributes:
      tallies: key of the configuration -> what became of the file's rows, for the files that were read so far.
    """

    def __init__(self, config: Config, encoder: Encoder):
        self.config = config
        self.encoder = encoder
        self.tallies: dict[str, Tally] = {}
        self._shapes: Shapes | None = None
        self._conversations: list[tuple[int, int]] = []  # tokens and answers' tokens of each, before the cut

    @cached_property
    def prompts(self) -> list[Prompt]:
        return self._prompts("prompts")

    @cached_property
    def heldout_prompts(self) -> list[Prompt]:
        return self._prompts("heldout_prompts")

    @cached_property
    def heldout_pairs(self) -> list[EncodedPair]:
        return self._pairs("heldout_pairs", need_label=True)

    @cached_property
    def given_pairs(self) -> list[EncodedPair]:
        return self._pairs("pairs", need_label=self.config.preference.labels == "external")

    @cached_property
    def eft(self) -> list[EncodedPair]:
        """Without ties, which teach a judge nothing."""
        return self._pairs("eft", need_label=True, ties=False)

    @cached_property
    def ift_rows(self) -> list[MarkedIds]:
        """Conversations as far as the model's context holds them."""
        path = self.config.data.ift
        if not path:
            return []
        tally = self.tally("ift", path)
        context = self.encoder.context
        rows = []
        for where, messages in _watched("ift", records.read_conversations(path, self.config.data.columns, tally)):
            with tally.row(where):
                found = self.encoder.conversation_rows(messages)
                kept = [(ids[:context], marks[:context]) for ids, marks in found if any(marks[:context])]
                if kept:
                    rows += kept
                    answers = sum(sum(marks) for _, marks in found)
                    self._conversations.append((max(len(ids) for ids, _ in found), answers))
                else:
                    tally.leave_out(f"no answer begins within the model's context of {context}")
        tally.finish(len(self._conversations))
        return rows

    @cached_property
    def eft_rows(self) -> list[MarkedIds]:
        """The judging examples under every template, both orders next to each other."""
        encoder = self.encoder
        return [row for judge in encoder.judges for pair in self.eft for row in encoder.verdict_rows(judge, pair)]

    @property
    def shapes(self) -> Shapes:
        """The static lengths, from all files; computed once."""
        if self._shapes is None:
            pairs = (self.heldout_pairs, self.given_pairs, self.eft)
            prompts = [*self.prompts, *self.heldout_prompts, *(pair.prompt for part in pairs for pair in part)]
            if not prompts:
                raise InputError("no prompts: set data.prompts (or data.pairs)")
            self.encoder.shapes(prompts)  # refuses what does not fit, before rows are made of it
            longest = (max((len(ids) for ids, _ in rows), default=0) for rows in (self.ift_rows, self.eft_rows))
            self._shapes = self.encoder.shapes(prompts, *longest)
        return self._shapes

    def shapes_for(self, prompts: Sequence[Prompt]) -> None:
        """Fixes the static lengths for a command that has prompts of its own."""
        self._shapes = self.encoder.shapes(prompts)

    def tally(self, key: str, path: str) -> Tally:
        """A new count of a file's rows."""
        self.tallies[key] = Tally(path, self.config.data.on_bad_row, self.config.data.max_bad_rows)
        return self.tallies[key]

    def encode_pairs(
        self, key: str, comparisons: Sequence[records.Comparison], *, ties: bool = True
    ) -> list[EncodedPair]:
        """Pairs in ids of a file that `tally(key, path)` counts."""
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
        """Of every file, by key of the configuration; reads those that were not read yet."""
        shapes = self.shapes
        context = self.encoder.context
        ift_rows = self.ift_rows
        files = {
            "prompts": _of_prompts(self.prompts, shapes.prompt),
            "ift": {
                "prompts": [tokens - answers for tokens, answers in self._conversations],
                "answers": [answers for _, answers in self._conversations],
                "prompts_cut": 0,
                "answers_cut": sum(tokens > context for tokens, _ in self._conversations),
                "rows": [len(ids) for ids, _ in ift_rows],
                "row_tokens": shapes.ift,
            },
            "eft": _of_pairs(self.eft, shapes.eft) | {"rows": [len(ids) for ids, _ in self.eft_rows]},
            "pairs": _of_pairs(self.given_pairs, shapes.scored),
            "heldout_prompts": _of_prompts(self.heldout_prompts, shapes.prompt),
            "heldout_pairs": _of_pairs(self.heldout_pairs, shapes.scored),
        }
        return {key: FileStatistics(self.tallies[key], **file) for key, file in files.items() if key in self.tallies}

    def to_dict(self) -> dict[str, Any]:
        """The statistics and the run's static lengths, as data.json has them."""
        files = {key: file.to_dict() for key, file in self.statistics().items()}
        return {"files": files, "shapes": dataclasses.asdict(self.shapes)}

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

    def _pairs(self, key: str, *, need_label: bool, ties: bool = True) -> list[EncodedPair]:
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
        "rows": [len(p.conversation) for p in prompts],
        "row_tokens": row_tokens,
    }


def _of_pairs(pairs: Sequence[EncodedPair], row_tokens: int) -> dict[str, Any]:
    answers = [y for pair in pairs for y in (pair.a, pair.b)]
    return _of_prompts([pair.prompt for pair in pairs], row_tokens) | {
        "answers": [y.tokens for y in answers],
        "answers_cut": sum(y.cut for y in answers),
        "rows": [len(pair.prompt.conversation) + len(y.ids) for pair in pairs for y in (pair.a, pair.b)],
    }


def _watched(key: str, items: Sequence) -> Iterator:
    """The items, with a progress bar where they are many."""
    if len(items) < SHOW_PROGRESS:
        yield from items
        return
    with console.stage(f"tokens of data.{key}", len(items)) as bar:
        for number, item in enumerate(items):
            yield item
            if number % 1000 == 999:
                bar.advance(by=1000)
