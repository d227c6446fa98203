"""From records to rows: the token budget of a run, and every kind of row within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scir_jax.config import Config
from scir_jax.data import records
from scir_jax.data.rows import Row, round_up
from scir_jax.errors import InputError
from scir_jax.text.chat import Chat, Ids
from scir_jax.text.judge import Judge


class Prompt(NamedTuple):
    """A prompt in the ids that are sampled from, and as the text that a judge is shown."""

    messages: records.Messages
    conversation: Ids
    text: Ids


class Response(NamedTuple):
    """A response: ids as sampled (with the stop token unless cut), and as the text that a judge is shown."""

    ids: Ids
    text: Ids


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
        # Of conversations, not of calls: the same prompt is encoded for several purposes.
        self._truncated: set[Ids] = set()
        self._dropped: set[Ids] = set()

    @property
    def truncated_prompts(self) -> int:
        """Different prompts that lost their middle."""
        return len(self._truncated)

    @property
    def dropped_prompts(self) -> int:
        """Different prompts that were left out for their length."""
        return len(self._dropped)

    @property
    def continued(self) -> bool:
        """The first template continues the conversation: its rows are the response rows too."""
        return bool(self.judges) and self.judges[0].template.layout == "continuation"

    @property
    def separate_judges(self) -> tuple[Judge, ...]:
        return self.judges[1:] if self.continued else self.judges

    # --- prompts and responses ---------------------------------------------------------------------------------------

    def prompt(self, messages: records.Messages) -> Prompt | None:
        """None where an over-long prompt is left out. Raises InputError where the configuration says so."""
        limit = self.config.max_prompt_tokens
        conversation = self.chat.prompt(messages)
        if len(conversation) > limit:
            if self.config.long_prompts == "error":
                start = records.prompt_text(messages)[:40]
                raise InputError(
                    f"the prompt {start!r}... has {len(conversation)} tokens, text.max_prompt_tokens is {limit}; "
                    "raise it, or set text.long_prompts to middle or drop"
                )
            if self.config.long_prompts == "drop":
                self._dropped.add(conversation)
                return None
            self._truncated.add(conversation)
            conversation = middle_cut(conversation, limit)
        text = middle_cut(self.chat.encode_text(records.prompt_text(messages)), limit)
        return Prompt(messages, conversation, text)

    def prompts(self, conversations: Sequence[records.Messages], where: str) -> list[Prompt]:
        kept = [p for m in conversations if (p := self.prompt(m)) is not None]
        if not kept:
            raise InputError(
                f"{where}: every prompt is longer than text.max_prompt_tokens={self.config.max_prompt_tokens}"
            )
        return kept

    def response(self, text: str) -> Response:
        """A given answer. One that is too long is cut, and a cut answer gets no stop token."""
        ids = self.chat.answer(text)[: self.config.max_response_tokens]
        return Response(ids, self.chat.encode_text(text)[: self.config.max_response_tokens])

    def sampled(self, ids: Sequence[int]) -> Response:
        text = self.chat.encode_text(self.chat.decode(ids))
        return Response(tuple(ids), text[: self.config.max_response_tokens])

    # --- rows -------------------------------------------------------------------------------------------------------

    def scored_row(self, prompt: Prompt, response: Response) -> Row:
        """[x y]."""
        return Row(prompt.conversation + response.ids, len(prompt.conversation), len(response.ids))

    def judge_row(self, judge: Judge, prompt: Prompt, a: Response, b: Response) -> Row:
        """The judge's question with a shown first; both answers are cut alike where they do not fit."""
        quote = self.quote_tokens(judge, len(prompt.conversation), len(prompt.text))
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

    def conversation_row(self, messages: records.Messages, limit: int) -> tuple[Ids, tuple[bool, ...]]:
        """A conversation with its assistants' turns (and stop tokens) marked; a row that is too long loses its end."""
        ids: list[int] = []
        marks: list[bool] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prefix = self.chat.prompt(messages[:i])
                answer = self.chat.answer(message["content"])
                # What stands before a turn is what sampling would stand on at that turn.
                ids, marks = [*prefix, *answer], [*_aligned(marks, ids, prefix), *[True] * len(answer)]
        return tuple(ids[:limit]), tuple(marks[:limit])

    def verdict_rows(self, judge: Judge, comparison: records.Comparison) -> list[tuple[Ids, tuple[bool, ...]]]:
        """The judge's question in both orders with the right verdict; [] where the prompt is left out."""
        prompt = self.prompt(comparison.messages)
        if prompt is None or comparison.label in (None, 0.5):
            return []
        answers = self.response(comparison.a), self.response(comparison.b)
        rows = []
        for swapped in (False, True):
            a, b = answers[::-1] if swapped else answers
            question = self.judge_row(judge, prompt, a, b).ids
            first_is_better = (comparison.label > 0.5) != swapped
            verdict = judge.verdict_ids[0 if first_is_better else 1]
            # The stop token behind it is not learned here: that would halve the verdict's share of the loss.
            marks = (False,) * (len(question) + 1 - judge.answer_tokens) + (True,) * judge.answer_tokens
            rows.append(((*question, verdict), marks))
        return rows

    # --- budget -----------------------------------------------------------------------------------------------------

    def quote_tokens(self, judge: Judge, conversation: int, prompt: int) -> int:
        """Tokens of each quoted answer that fit into the context; InputError if none do."""
        response = self.config.max_response_tokens
        fixed = judge.fixed_tokens + judge.slots("prompt") * prompt + 1  # the verdict
        if judge.template.layout == "continuation":
            fixed += conversation + response + 1
        room = (self.context - fixed) // (judge.slots("response_a") + judge.slots("response_b"))
        # In a continuation only the other answer is quoted: cutting it alone would not be alike.
        least = response if judge.template.layout == "continuation" else 1
        if room < least:
            raise InputError(
                f"judge template {judge.template.name}: a question of {fixed} tokens leaves no room for the answers in "
                f"the model's context of {self.context}; lower text.max_prompt_tokens or text.max_response_tokens"
            )
        return min(room, response)

    def shapes(self, prompts: Sequence[Prompt], ift_tokens: int = 0, eft_tokens: int = 0) -> Shapes:
        """Static lengths for these prompts and for supervised rows of at most so many tokens.

        Raises InputError where prompt and response do not fit into the context.
        """
        if not prompts:
            raise InputError("no prompt is left: every one is longer than text.max_prompt_tokens")
        conversation = max(len(p.conversation) for p in prompts)
        text = max(len(p.text) for p in prompts)
        response = self.config.max_response_tokens
        if conversation + response > self.context:
            raise InputError(
                f"a prompt of {conversation} and a response of {response} tokens exceed the model's context of "
                f"{self.context}; lower text.max_prompt_tokens or text.max_response_tokens"
            )
        lengths = []
        for judge in self.judges:
            quote = self.quote_tokens(judge, conversation, text)
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


def middle_cut(ids: Ids, limit: int) -> Ids:
    """Keeps the beginning (system text, the task) and the end (the question, the assistant's header)."""
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :]


def _aligned(marks: list[bool], before: list[int], prefix: Ids) -> list[bool]:
    """Marks of earlier turns, where the longer conversation still begins with them; else unmarked."""
    if tuple(before) == prefix[: len(before)]:
        return marks + [False] * (len(prefix) - len(before))
    return [False] * len(prefix)
