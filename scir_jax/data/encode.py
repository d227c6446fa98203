"""From records to ids: the token budget of a run, and every kind of row within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from scir_jax.config.schema import TextConfig
from scir_jax.data.messages import Messages, prompt_text
from scir_jax.data.pairs import Answer, Pair, Prompt
from scir_jax.data.records import Comparison
from scir_jax.data.tally import PromptTooLong
from scir_jax.errors import InputError
from scir_jax.text.chat import Chat
from scir_jax.text.judge import Judge
from scir_jax.text.tokens import Ids

ANSWERS = ("response_a", "response_b", "response")
"""slots of judge templates that an answer is put into"""


class Row(NamedTuple):
    """One row before padding.

    Attributes:
      ids: token ids.
      start: tokens before the first answer.
      length: number of the scored tokens, which begin there.
      judged: the last token's hidden state predicts a verdict.
    """

    ids: Ids
    start: int = 0
    length: int = 0
    judged: bool = False


class Marked(NamedTuple):
    """A supervised row: `marks` says of every id whether it is to be learned; `where` names the row it came from."""

    ids: Ids
    marks: tuple[bool, ...]
    where: str = ""


@dataclass(frozen=True)
class Lengths:
    """The static lengths of a run, in tokens: one compilation each.

    Attributes:
      prompt, answer: of the sampler's prompts and answers.
      quote: of a prompt as a judge is shown it.
      scored: of a row with a prompt and its answer.
      judges: of each template's question.
      targets: of supervised rows by name, "ift" and "eft"; 0 where there are none.
      learned: the most tokens that such a row learns.
      verdict: the most tokens that a judge's question learns.
      pointwise: of the question about one answer; 0 where it is not asked.
    """

    prompt: int
    answer: int
    quote: int
    scored: int
    judges: tuple[int, ...]
    targets: dict[str, int]
    learned: dict[str, int]
    verdict: int = 1
    pointwise: int = 0


class Encoder:
    """Makes ids and rows. Cutting happens here and nowhere else.

    Attributes:
      chat: the tokenizer with its chat template.
      judges: the compiled judge templates that compare two answers.
      pointwise: the one that gives points to one answer, where it is asked.
      context: tokens that the model can take.
    """

    def __init__(
        self,
        text: TextConfig,
        chat: Chat,
        judges: Sequence[Judge],
        context: int,
        *,
        pointwise: Judge | None = None,
        quote_thinking: bool = False,
    ):
        self.config = text
        self.chat = chat
        self.judges = tuple(judges)
        self.pointwise = pointwise
        self.context = context
        self._quote_thinking = quote_thinking

    @property
    def continued(self) -> bool:
        """Whether the first template continues the conversation, so that its rows can be the answers' rows too."""
        return bool(self.judges) and self.judges[0].template.layout == "continuation"

    # --- prompts, answers, pairs -------------------------------------------------------------------------------------

    @cached_property
    def _around_prompt(self) -> tuple[int, int]:
        """Counts the tokens that the chat template writes before and behind a single message."""
        slot = (-1,)
        ids = self.chat.flatten(self.chat.pieces([{"role": "user", "content": [slot]}], generation_prompt=True))
        return ids.index(-1), len(ids) - ids.index(-1) - 1

    def prompt(self, messages: Messages, where: str = "") -> Prompt | None:
        """Encodes a prompt.

        Args:
          where: names the row that it came from.

        Returns:
          The prompt, or None where it is too long and is left out.

        Raises:
          PromptTooLong: text.long_prompts is error.
          InputError: the chat template refuses the conversation, or leaves no room within text.max_prompt_tokens.
        """
        limit = self.config.max_prompt_tokens
        ids = self.chat.prompt(messages)
        tokens = len(ids)
        if tokens > limit:
            if self.config.long_prompts == "error":
                raise PromptTooLong(
                    f"the prompt {prompt_text(messages)[:40]!r}... has {tokens} tokens, "
                    f"text.max_prompt_tokens is {limit}; raise it, or set text.long_prompts to middle or drop"
                )
            if self.config.long_prompts == "drop":
                return None
            before, behind = self._around_prompt
            if limit < before + behind + 2:
                raise InputError(
                    f"text.max_prompt_tokens={limit} leaves no room beside the chat template's own {before + behind} "
                    "tokens; raise it"
                )
            ids = middle_cut(ids, limit, behind + 1)
        shown = [{**m, "content": self._quoted(m["content"])} if m["role"] == "assistant" else m for m in messages]
        quote = middle_cut(self.chat.encode_text(prompt_text(shown)), limit)
        return Prompt(messages, ids, quote, where, tokens)

    def answer(self, text: str) -> Answer:
        """Encodes a given answer. One that is too long is cut, and a cut answer gets no stop token."""
        limit = self.config.max_response_tokens
        ids = self.chat.answer(text)
        return Answer(text, ids[:limit], self._quote(text), len(ids))

    def sampled(self, ids: Sequence[int]) -> Answer:
        """Makes an answer of ids as they were sampled."""
        text = self.chat.decode(ids)
        return Answer(text, tuple(ids), self._quote(text, sampled=True), len(ids))

    def shown(self, answer: Answer) -> str:
        """Returns an answer's text as a judge sees it: without thinking, unless generative.quote_thinking is set."""
        # Nothing is quoted where the thinking does not end.
        return self._quoted(answer.text) if answer.quote else ""

    def pair(self, comparison: Comparison) -> Pair | None:
        """Encodes two given answers to a prompt.

        Returns:
          The pair, or None where the prompt is left out for its length.
        """
        prompt = self.prompt(comparison.messages, comparison.where)
        if prompt is None:
            return None
        return Pair(prompt, self.answer(comparison.a), self.answer(comparison.b), comparison.label)

    def _quoted(self, text: str, sampled: bool = False) -> str:
        return text if self._quote_thinking else self.chat.spoken(text, sampled=sampled)

    def _quote(self, text: str, sampled: bool = False) -> Ids:
        return self.chat.encode_text(self._quoted(text, sampled))[: self.config.max_response_tokens]

    # --- rows -------------------------------------------------------------------------------------------------------

    def scored_row(self, prompt: Prompt, answer: Answer) -> Row:
        """Returns the row of a prompt with its answer behind it, which is scored."""
        return Row(prompt.ids + answer.ids, len(prompt.ids), len(answer.ids))

    def judge_row(self, judge: Judge, prompt: Prompt, a: Answer, b: Answer) -> Row:
        """Returns the judge's question with `a` shown first; both answers are cut alike where they do not fit.

        In the continuation layout the row holds the prompt, `a`, and a question with `b`; `a` is scored too.

        Raises:
          InputError: nothing of an answer fits.
        """
        quote = self.quote_tokens(judge, len(prompt.ids), len(prompt.quote), _at(prompt))
        ids = judge.row(
            conversation=prompt.ids,
            prompt=prompt.quote,
            a=a.ids,
            b=b.ids,
            a_text=a.quote[:quote],
            b_text=b.quote[:quote],
        )
        if judge.template.layout == "continuation":
            return Row(ids, len(prompt.ids), len(a.ids), judged=True)
        return Row(ids, judge.opening(len(prompt.quote)), judged=True)

    def pointwise_row(self, prompt: Prompt, answer: Answer) -> Row:
        """Returns the question how many points an answer is worth; an answer that does not fit is cut.

        Raises:
          InputError: nothing of it fits.
        """
        quote = self.quote_tokens(self.pointwise, len(prompt.ids), len(prompt.quote), _at(prompt))
        return Row(self.pointwise.pointwise_row(prompt.quote, answer.quote[:quote]), judged=True)

    def answer_rows(self, pair: Pair) -> tuple[Row, Row]:
        """Returns the rows of both answers, each behind the prompt."""
        return self.scored_row(pair.prompt, pair.a), self.scored_row(pair.prompt, pair.b)

    def judge_rows(self, judge: Judge, pair: Pair) -> tuple[Row, Row]:
        """Returns the judge's question about a pair with the first, and with the second answer shown as A."""
        return self.judge_row(judge, pair.prompt, pair.a, pair.b), self.judge_row(judge, pair.prompt, pair.b, pair.a)

    def conversation_rows(self, messages: Messages) -> list[Marked]:
        """Returns the rows of a conversation of any length, with the assistant's turns (and stop tokens) marked.

        There is one row, unless the template shows an earlier answer otherwise than it was sampled (without its
        thinking, say). Then there is one row for each such beginning, so that every answer is learned once, behind the
        text that it is sampled behind.
        """
        rows = []
        ids: Ids = ()
        marks: tuple[bool, ...] = ()
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prefix = self.chat.prompt(messages[:i])
                answer = self.chat.answer(message["content"])
                if prefix[: len(ids)] != ids:
                    rows.append(Marked(ids, marks))
                    ids, marks = (), ()
                marks += (False,) * (len(prefix) - len(ids)) + (True,) * len(answer)
                ids = prefix + answer
        return [*rows, Marked(ids, marks)] if ids else rows

    def verdict_rows(self, judge: Judge, pair: Pair) -> list[Marked]:
        """Returns the judge's question in both orders with the right verdict; no row where neither answer is better."""
        if pair.label in (None, 0.5):
            return []
        rows = []
        for swapped, row in enumerate(self.judge_rows(judge, pair)):
            first_is_better = (pair.label > 0.5) != bool(swapped)
            verdict = judge.verdict_ids[0 if first_is_better else 1]
            # The stop token behind it is not learned here: that would halve the verdict's share of the loss.
            marks = (False,) * (len(row.ids) + 1 - judge.answer_tokens) + (True,) * judge.answer_tokens
            rows.append(Marked((*row.ids, verdict), marks, pair.prompt.where))
        return rows

    # --- budget -----------------------------------------------------------------------------------------------------

    def quote_tokens(self, judge: Judge, conversation: int, prompt: int, at: str = "") -> int:
        """Returns how many tokens of each quoted answer fit into the context.

        Args:
          conversation, prompt: tokens of the prompt's ids and of its quote.
          at: beginning of the error's sentence.

        Raises:
          InputError: no token fits.
        """
        answer = self.config.max_response_tokens
        fixed = judge.fixed_tokens + judge.slots("prompt") * prompt + 1  # the verdict
        if judge.template.layout == "continuation":
            fixed += conversation + answer + 1
        room = (self.context - fixed) // sum(map(judge.slots, ANSWERS))
        # In a continuation only the other answer is quoted: cutting it alone would not treat both alike.
        least = answer if judge.template.layout == "continuation" else 1
        if room < least:
            raise InputError(
                f"{at}judge template {judge.template.name}: a question of {fixed} tokens leaves no room for the "
                f"answers in the model's context of {self.context}; lower text.max_prompt_tokens or "
                "text.max_response_tokens"
            )
        return min(room, answer)

    def lengths(
        self,
        prompts: Sequence[Prompt],
        targets: dict[str, int] | None = None,
        learned: dict[str, int] | None = None,
    ) -> Lengths:
        """Returns the static lengths for these prompts.

        Args:
          targets: tokens of the longest supervised row by name.
          learned: the most tokens that a row learns, by name; by default all.

        Raises:
          InputError: there is no prompt, or a prompt and its answer do not fit into the context.
        """
        if not prompts:
            raise InputError("no prompt is left: every one is longer than text.max_prompt_tokens")
        longest = max(prompts, key=lambda p: len(p.ids))
        longest_quote = max(prompts, key=lambda p: len(p.quote))
        conversation, quoted = len(longest.ids), len(longest_quote.quote)
        answer = self.config.max_response_tokens
        if conversation + answer > self.context:
            raise InputError(
                f"{_at(longest)}a prompt of {conversation} and a response of {answer} tokens exceed the model's "
                f"context of {self.context}; lower text.max_prompt_tokens or text.max_response_tokens"
            )
        judges = []
        for judge in (*self.judges, *([self.pointwise] if self.pointwise else [])):
            quote = self.quote_tokens(judge, conversation, quoted, _at(longest_quote))
            length = judge.fixed_tokens + judge.slots("prompt") * quoted
            length += sum(map(judge.slots, ANSWERS)) * quote
            if judge.template.layout == "continuation":
                length += conversation + answer + 1
            judges.append(length)

        def static(tokens: int) -> int:
            return min(round_up(tokens), self.context)

        return Lengths(
            prompt=static(conversation),
            answer=answer,
            quote=quoted,
            scored=static(conversation + answer),
            judges=tuple(map(static, judges[: len(self.judges)])),
            targets={name: static(tokens) if tokens else 0 for name, tokens in (targets or {}).items()},
            learned=dict(targets or {}) if learned is None else learned,
            verdict=max((judge.answer_tokens for judge in self.judges), default=1),
            pointwise=static(judges[-1]) if self.pointwise else 0,
        )


def middle_cut(ids: Ids, limit: int, least_end: int = 0) -> Ids:
    """Cuts the middle out of ids that are more than `limit`.

    The beginning (system text, the task) and the end (the question, the assistant's header) stay.

    Args:
      least_end: how many tokens of the end stay where half of `limit` is less.
    """
    if len(ids) <= limit:
        return ids
    end = min(max(limit - limit // 2, least_end), limit)
    return ids[: limit - end] + ids[len(ids) - end :]


def round_up(tokens: int) -> int:
    """Rounds up to a row length that suits the hardware: a multiple of 8, of 128 above 256 tokens."""
    unit = 8 if tokens <= 256 else 128
    return -(-tokens // unit) * unit


def _at(prompt: Prompt) -> str:
    return f"{prompt.where}: " if prompt.where else ""
