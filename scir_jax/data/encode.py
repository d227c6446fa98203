"""From records to rows: the token budget of a run, and every kind of row within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from scir_jax.config import Config
from scir_jax.data.messages import Messages, prompt_text
from scir_jax.data.records import Comparison
from scir_jax.data.rows import Row, round_up
from scir_jax.data.tally import PromptTooLong
from scir_jax.errors import InputError
from scir_jax.text.chat import Chat, Ids
from scir_jax.text.judge import Judge


class Prompt(NamedTuple):
    """A prompt in the ids that are sampled from, and as the text that a judge is shown.

    `where` names its row; `tokens` is the conversation's length before it lost its middle.
    """

    messages: Messages
    conversation: Ids
    text: Ids
    where: str = ""
    tokens: int = 0

    @property
    def cut(self) -> bool:
        return len(self.conversation) < self.tokens


class Response(NamedTuple):
    """A response: ids as sampled (with the stop token unless cut), and as the text that a judge is shown.

    `tokens` is the ids' number before they were cut.
    """

    ids: Ids
    text: Ids
    tokens: int = 0

    @property
    def cut(self) -> bool:
        return len(self.ids) < self.tokens


class EncodedPair(NamedTuple):
    """A comparison with its prompt and answers in ids."""

    comparison: Comparison
    prompt: Prompt
    a: Response
    b: Response


@dataclass(frozen=True)
class Shapes:
    """The static lengths of a run, in tokens: one compilation each."""

    prompt: int
    response: int
    scored: int  # [prompt response]
    row: int  # the training step's response rows
    judges: tuple[int, ...]  # of every template
    ift: int
    eft: int


class Encoder:
    """Makes rows. Cutting happens here and nowhere else."""

    def __init__(self, config: Config, chat: Chat, judges: Sequence[Judge], context: int):
        self.config = config.text
        self.chat = chat
        self.judges = tuple(judges)
        self.context = context

    @property
    def continued(self) -> bool:
        """The first template continues the conversation: its rows are the response rows too."""
        return bool(self.judges) and self.judges[0].template.layout == "continuation"

    @property
    def separate_judges(self) -> tuple[Judge, ...]:
        return self.judges[1:] if self.continued else self.judges

    # --- prompts and responses ---------------------------------------------------------------------------------------

    @cached_property
    def _around_prompt(self) -> tuple[int, int]:
        """Tokens that the chat template writes before and behind a single message."""
        slot = (-1,)
        ids = self.chat.flatten(self.chat.pieces([{"role": "user", "content": [slot]}], generation_prompt=True))
        return ids.index(-1), len(ids) - ids.index(-1) - 1

    def prompt(self, messages: Messages, where: str = "") -> Prompt | None:
        """None where an over-long prompt is left out.

        Raises:
          PromptTooLong: text.long_prompts is error.
          InputError: the chat template refuses the conversation, or leaves no room within text.max_prompt_tokens.
        """
        limit = self.config.max_prompt_tokens
        conversation = self.chat.prompt(messages)
        tokens = len(conversation)
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
            conversation = middle_cut(conversation, limit, behind + 1)
        text = middle_cut(self.chat.encode_text(prompt_text(messages)), limit)
        return Prompt(messages, conversation, text, where, tokens)

    def response(self, text: str) -> Response:
        """A given answer. One that is too long is cut, and a cut answer gets no stop token."""
        limit = self.config.max_response_tokens
        ids = self.chat.answer(text)
        return Response(ids[:limit], self.chat.encode_text(text)[:limit], len(ids))

    def pair(self, comparison: Comparison) -> EncodedPair | None:
        """None where the prompt is left out for its length."""
        prompt = self.prompt(comparison.messages, comparison.where)
        if prompt is None:
            return None
        return EncodedPair(comparison, prompt, self.response(comparison.a), self.response(comparison.b))

    def sampled(self, ids: Sequence[int]) -> Response:
        text = self.chat.encode_text(self.chat.decode(ids))
        return Response(tuple(ids), text[: self.config.max_response_tokens], len(ids))

    # --- rows -------------------------------------------------------------------------------------------------------

    def scored_row(self, prompt: Prompt, response: Response) -> Row:
        """[x y]."""
        return Row(prompt.conversation + response.ids, len(prompt.conversation), len(response.ids))

    def judge_row(self, judge: Judge, prompt: Prompt, a: Response, b: Response) -> Row:
        """The judge's question with a shown first; both answers are cut alike where they do not fit."""
        quote = self.quote_tokens(judge, len(prompt.conversation), len(prompt.text), _at(prompt))
        ids = judge.row(
            conversation=prompt.conversation,
            prompt=prompt.text,
            a=a.ids,
            b=b.ids,
            a_text=a.text[:quote],
            b_text=b.text[:quote],
        )
        if judge.template.layout == "continuation":
            return Row(ids, len(prompt.conversation), len(a.ids), judged=True)
        return Row(ids, judged=True)

    def pair_rows(self, prompt: Prompt, a: Response, b: Response) -> tuple[tuple[Row, Row], list[tuple[Row, Row]]]:
        """The two response rows, and for each further template the two judge rows."""
        orders = ((a, b), (b, a))
        if self.continued:
            responses = tuple(self.judge_row(self.judges[0], prompt, *order) for order in orders)
        else:
            responses = tuple(self.scored_row(prompt, y) for y in (a, b))
        judged = [tuple(self.judge_row(j, prompt, *order) for order in orders) for j in self.separate_judges]
        return responses, judged

    def conversation_rows(self, messages: Messages) -> list[tuple[Ids, tuple[bool, ...]]]:
        """A conversation, of any length, with its assistants' turns (and stop tokens) marked.

        One row, unless the template shows an earlier answer otherwise than it was sampled (without its thinking, say):
        then a row for each such beginning, so that every answer is learned once, behind what it is sampled behind.
        """
        rows = []
        ids: Ids = ()
        marks: tuple[bool, ...] = ()
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prefix = self.chat.prompt(messages[:i])
                answer = self.chat.answer(message["content"])
                if prefix[: len(ids)] != ids:
                    rows.append((ids, marks))
                    ids, marks = (), ()
                marks += (False,) * (len(prefix) - len(ids)) + (True,) * len(answer)
                ids = prefix + answer
        return [*rows, (ids, marks)] if ids else rows

    def verdict_rows(self, judge: Judge, pair: EncodedPair) -> list[tuple[Ids, tuple[bool, ...]]]:
        """The judge's question in both orders with the right verdict; [] where neither answer is said to be better."""
        comparison = pair.comparison
        if comparison.label in (None, 0.5):
            return []
        rows = []
        for swapped in (False, True):
            a, b = (pair.b, pair.a) if swapped else (pair.a, pair.b)
            question = self.judge_row(judge, pair.prompt, a, b).ids
            first_is_better = (comparison.label > 0.5) != swapped
            verdict = judge.verdict_ids[0 if first_is_better else 1]
            # The stop token behind it is not learned here: that would halve the verdict's share of the loss.
            marks = (False,) * (len(question) + 1 - judge.answer_tokens) + (True,) * judge.answer_tokens
            rows.append(((*question, verdict), marks))
        return rows

    # --- budget -----------------------------------------------------------------------------------------------------

    def quote_tokens(self, judge: Judge, conversation: int, prompt: int, at: str = "") -> int:
        """Tokens of each quoted answer that fit into the context; InputError, beginning with `at`, if none do."""
        response = self.config.max_response_tokens
        fixed = judge.fixed_tokens + judge.slots("prompt") * prompt + 1  # the verdict
        if judge.template.layout == "continuation":
            fixed += conversation + response + 1
        room = (self.context - fixed) // (judge.slots("response_a") + judge.slots("response_b"))
        # In a continuation only the other answer is quoted: cutting it alone would not be alike.
        least = response if judge.template.layout == "continuation" else 1
        if room < least:
            raise InputError(
                f"{at}judge template {judge.template.name}: a question of {fixed} tokens leaves no room for the "
                f"answers in the model's context of {self.context}; lower text.max_prompt_tokens or "
                "text.max_response_tokens"
            )
        return min(room, response)

    def shapes(self, prompts: Sequence[Prompt], ift_tokens: int = 0, eft_tokens: int = 0) -> Shapes:
        """Static lengths for these prompts and for supervised rows of at most so many tokens.

        Raises InputError where prompt and response do not fit into the context.
        """
        if not prompts:
            raise InputError("no prompt is left: every one is longer than text.max_prompt_tokens")
        longest = max(prompts, key=lambda p: len(p.conversation))
        longest_text = max(prompts, key=lambda p: len(p.text))
        conversation, text = len(longest.conversation), len(longest_text.text)
        response = self.config.max_response_tokens
        if conversation + response > self.context:
            raise InputError(
                f"{_at(longest)}a prompt of {conversation} and a response of {response} tokens exceed the model's "
                f"context of {self.context}; lower text.max_prompt_tokens or text.max_response_tokens"
            )
        lengths = []
        for judge in self.judges:
            quote = self.quote_tokens(judge, conversation, text, _at(longest_text))
            length = judge.fixed_tokens + judge.slots("prompt") * text
            length += (judge.slots("response_a") + judge.slots("response_b")) * quote
            if judge.template.layout == "continuation":
                length += conversation + response + 1
            lengths.append(length)

        def shape(tokens: int) -> int:
            return min(round_up(tokens), self.context)

        return Shapes(
            prompt=shape(conversation),
            response=response,
            scored=shape(conversation + response),
            row=shape(lengths[0] if self.continued else conversation + response),
            judges=tuple(map(shape, lengths)),
            ift=shape(ift_tokens) if ift_tokens else 0,
            eft=shape(eft_tokens) if eft_tokens else 0,
        )


def middle_cut(ids: Ids, limit: int, least_end: int = 0) -> Ids:
    """Keeps the beginning (system text, the task) and the end (the question, the assistant's header).

    Args:
      least_end: how many tokens of the end are kept where half of `limit` is less.
    """
    if len(ids) <= limit:
        return ids
    end = min(max(limit - limit // 2, least_end), limit)
    return ids[: limit - end] + ids[len(ids) - end :]


def _at(prompt: Prompt) -> str:
    return f"{prompt.where}: " if prompt.where else ""
