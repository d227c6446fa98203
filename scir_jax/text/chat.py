"""Conversations to token ids.

A chat template is rendered with place-holders, so that its own text (which may spell control tokens) and the text of
users and models (which may not) stay apart until both are ids; and with the contents themselves, to see what it makes
of them: many templates trim contents, some leave out an earlier answer's thinking.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from scir_jax.errors import InputError
from scir_jax.text.tokens import THINKING, Ids, TextEncoder, Writer

# Private-use characters around a message's number; a template passes them through untouched.
_SLOT = "\ue000{}\ue001"
_SLOT_PATTERN = re.compile("\ue000(\\d+)\ue001")

# What a template that asks for the date is told: a run resumed tomorrow has the same prompts.
DATE = date(2024, 7, 26)
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

Content = str | Sequence["str | Ids"]
"""A message's content: text, or pieces of text and of finished ids."""

Skeleton = tuple[Any, ...]
"""A rendered conversation: the template's texts, and between them the numbers of the messages."""


class Literal(str):
    """Text of a template's author, which may spell control tokens."""


def load_tokenizer(directory: Path):
    """Loads the tokenizer of a Hugging Face directory, without torch and without remote code.

    Raises:
      InputError: the directory has none that loads.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise InputError(f"{directory}: no tokenizer (tokenizer.json or tokenizer.model); copy the model's there")
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{directory}: the tokenizer does not load: {reason}") from None


class Chat:
    """A tokenizer with its chat template.

    Attributes:
      lead: template text between a prompt and a given answer: the space that the template writes there, an empty
        thinking block, or the end of one that the prompt opens.
      opened: the mark of the thinking block that the prompt opens; "" where it opens none.
      stop_ids: tokens that end an assistant's turn, the first one is written after a given answer.
      control_ids: tokens that no text of users or models becomes.
      pad_id: fills rows; never looked at.
    """

    def __init__(
        self,
        tokenizer,
        where: str,
        stop_ids: Sequence[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        """
        Args:
          where: names the tokenizer in errors.
          stop_ids: end-of-sequence tokens beside the tokenizer's own.
          template_kwargs: options of the chat template (`enable_thinking`, `date_string`): flags, texts, numbers.

        Raises:
          InputError: no chat template, one that does not render or writes no header for an answer, an option that it
            does not read, no stop token.
        """
        self.tokenizer = tokenizer
        self.where = where
        self._source = _template_source(tokenizer, where)
        self._kwargs = self._checked(template_kwargs or {})
        self._skeletons: dict[tuple, Skeleton] = {}
        stops = list(dict.fromkeys(i for i in (*stop_ids, tokenizer.eos_token_id) if i is not None))
        self._text = TextEncoder(tokenizer, where, stops)
        self.control_ids = self._text.control_ids
        self.lead, self._trail, behind = self._around_answer()
        # The stop token that the template itself writes after an answer comes first.
        closing = next((i for i in behind if i in stops), next(iter(behind), None))
        self.stop_ids: Ids = tuple(dict.fromkeys([closing, *stops] if closing is not None else stops))
        if not self.stop_ids:
            raise InputError(
                f"{where}: neither generation_config.json nor the tokenizer names an end-of-sequence token"
            )
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]
        header = Writer(self._text)
        header.template(self._header)
        header.finish()
        self._answer_state = header.state

    # --- text -------------------------------------------------------------------------------------------------------

    def encode_text(self, text: str) -> Ids:
        """Returns the ids of plain text in the midst of other text; no control token, whatever the text spells.

        Raises:
          InputError: the tokenizer can only write a character as a control token.
        """
        return self._text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes response ids without their stop token; control tokens inside are spelled out."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # --- conversations ----------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[dict]) -> Ids:
        """Returns the ids of a conversation up to where the assistant's answer begins.

        Raises:
          InputError: as `pieces` does.
        """
        return self.flatten(self.pieces(messages, generation_prompt=True))

    def answer(self, text: str) -> Ids:
        """Returns the ids of a complete given answer, with its stop token, as they stand behind a prompt.

        An answer that begins with a thinking block of its own takes the place of the empty one that the template
        writes; where the prompt has opened the block, the answer's opening mark is left out, if it has one. Marks that
        are special tokens are no marks where an answer spells them.
        """
        writer = Writer(self._text, self._answer_state)
        lead, text = self.lead, self._trimmed_answer(text)
        for begin, end in THINKING:
            if begin in self._text.added:
                continue
            if lead.strip() and text.lstrip().startswith(begin):
                lead, text = "", text.lstrip().removeprefix(begin).removeprefix("\n") if self.opened else text
            elif self.opened == begin and end in text:
                lead = ""
        writer.template(lead)
        writer.text(text)
        writer.template(self._trail)
        return self.flatten(writer.finish()) + self.stop_ids[:1]

    def spoken(self, text: str, *, sampled: bool = False) -> str:
        """Returns an answer's text without the thinking block before it; "" where that block does not end.

        Args:
          sampled: the text goes on from where the prompt ends. A given answer need not: it may be without the thinking
            that the prompt opens.
        """
        for begin, end in THINKING:
            goes_on = self.opened == begin and (sampled or end in text)
            if goes_on or text.lstrip().startswith(begin):
                return text.partition(end)[2].lstrip()
        return text

    @staticmethod
    def flatten(pieces: Sequence[Ids]) -> Ids:
        """Joins pieces into one row of ids."""
        return tuple(i for piece in pieces for i in piece)

    def pieces(
        self, messages: Sequence[dict], *, generation_prompt: bool, suffix: Sequence[Literal | str] = ()
    ) -> list[Ids]:
        """Returns the ids of a conversation; contents given as ids are pieces of their own.

        All text between them is tokenised together, as the whole rendered text would be; control tokens come from the
        template alone.

        Args:
          messages: role and content each; a content is text, or text and id tuples in turn.
          suffix: texts behind the rendered template, tokenised together with the template's last text.

        Raises:
          InputError: the template refuses the conversation, leaves out a message, or changes one beyond recognition.
        """
        contents = [m["content"] for m in messages]
        mark = ""
        if not all(isinstance(c, str) for c in contents):
            mark = _unused([t for c in contents for t in c if isinstance(t, str)])
            contents = [
                c if isinstance(c, str) else "".join(t if isinstance(t, str) else mark for t in c) for c in contents
            ]
        skeleton, shown = self._rendered([m["role"] for m in messages], contents, generation_prompt)
        given = {i for i, m in enumerate(messages) if m["role"] == "assistant" and not isinstance(m["content"], str)}
        writer = Writer(self._text)
        for place, part in enumerate(skeleton):
            if isinstance(part, str):
                # An answer's ids hold what stands around its text.
                if place and skeleton[place - 1] in given:
                    part = part.removeprefix(self._trail)
                if place + 1 < len(skeleton) and skeleton[place + 1] in given:
                    part = part.removesuffix(self.lead)
                writer.template(part)
                continue
            content = messages[part]["content"]
            if isinstance(content, str):
                writer.text(shown[part])
                continue
            ids = [item for item in content if not isinstance(item, str)]
            first, *texts = shown[part].split(mark)
            if len(texts) != len(ids):
                raise InputError(f"{self.where}: the chat template leaves out a part of message {part}")
            writer.text(first)
            for item, text in zip(ids, texts):
                writer.ids(item)
                writer.text(text)
        for text in suffix:
            (writer.template if isinstance(text, Literal) else writer.text)(text)
        return writer.finish()

    @cached_property
    def allows_system(self) -> bool:
        """Whether the template takes a system message, and shows it."""
        return self._renders(("system", "user"))

    # --- rendering --------------------------------------------------------------------------------------------------

    def _rendered(
        self, roles: Sequence[str], contents: Sequence[str], generation_prompt: bool
    ) -> tuple[Skeleton, Sequence[str]]:
        """Returns the template's own texts, and the contents as the template shows them."""
        skeleton = self._skeleton(tuple(roles), generation_prompt, contents)
        whole = self._render(roles, contents, generation_prompt)
        if _fill(skeleton, contents) == whole:
            return skeleton, contents
        # The template trims contents, or looks into them. What becomes of each is seen when all others are slots.
        shown = [self._shown(i, roles, contents, generation_prompt, skeleton) for i in range(len(roles))]
        for i, (text, content) in enumerate(zip(shown, contents)):
            # More control tokens than the content spells must be the template's, but cannot be told apart from it.
            if text is None or not self._text.spelled(text) <= self._text.spelled(content):
                raise self._changed(i, roles[i], content)
        if _fill(skeleton, shown) != whole:
            raise self._changed(len(roles) - 1, roles[-1], contents[-1])
        return skeleton, shown

    def _shown(
        self, number: int, roles: Sequence[str], contents: Sequence[str], generation_prompt: bool, skeleton: Skeleton
    ) -> str | None:
        """Returns one content as the template shows it; None where the text around it is not as for other contents."""
        content = contents[number]
        if number not in skeleton:
            return content
        slots = _slots(contents)
        text = self._render(roles, [*slots[:number], content, *slots[number + 1 :]], generation_prompt)
        at = skeleton.index(number)
        start, end = _fill(skeleton[:at], slots), _fill(skeleton[at + 1 :], slots)
        if len(text) < len(start) + len(end) or not (text.startswith(start) and text.endswith(end)):
            return None
        return text[len(start) : len(text) - len(end)]

    def _skeleton(self, roles: tuple[str, ...], generation_prompt: bool, contents: Sequence[str] = ()) -> Skeleton:
        """Renders a conversation with a slot for each content.

        A blank content (none by default) stays as it is: templates ask whether there is one, and trim what is around.
        """
        slots = _slots(contents or roles)
        key = (roles, generation_prompt, tuple(slots))
        if key not in self._skeletons:
            parts = _SLOT_PATTERN.split(self._render(roles, slots, generation_prompt))
            skeleton = tuple(int(part) if place % 2 else part for place, part in enumerate(parts))
            if missing := [i for i, slot in enumerate(slots) if slot.strip() and i not in skeleton]:
                raise InputError(
                    f"{self.where}: the chat template leaves out the content of message {missing[0]} "
                    f"({roles[missing[0]]})"
                )
            self._skeletons[key] = skeleton
        return self._skeletons[key]

    def _render(self, roles: Sequence[str], contents: Sequence[str], generation_prompt: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._kwargs,
            )
        except Exception as error:  # the template's own raise_exception, or a Jinja error
            reason = " ".join(str(error).split())
        advice = "take out what it does not allow"
        if roles[0] == "system" and self._renders(roles[1:]):
            advice = "put the system text at the beginning of the first user message"
        raise InputError(
            f"{self.where}: the chat template refuses a conversation of ({', '.join(map(str, roles))}): {reason}; "
            f"{advice}"
        )

    def _renders(self, roles: Sequence[str]) -> bool:
        try:
            return bool(roles and self._skeleton(tuple(roles), True))
        except InputError:
            return False

    def _changed(self, number: int, role: str, content: str) -> InputError:
        start = content if len(content) < 40 else content[:40] + "..."
        return InputError(
            f"{self.where}: the chat template does not show message {number} ({role}, {start!r}) as it shows others; "
            "take out of the message what the template looks for, or use a template that writes messages as they are"
        )

    # --- the assistant's turn ---------------------------------------------------------------------------------------

    def _around_answer(self) -> tuple[str, str, list[int]]:
        """Finds the template's text before an answer (`lead`), white space behind it, and the control tokens behind it.

        Llama 2 and Mistral write "[/INST] answer </s>", but end the prompt at "[/INST]": the spaces are the model's to
        sample, so they belong to the answer.
        """
        *before, header = self._skeleton(("user",), True)
        whole = self._skeleton(("user", "assistant"), False)
        at = whole.index(1)
        between, behind = whole[at - 1], self._text.split(whole[at + 1])
        lead = None
        if list(whole[: at - 1]) == before and between.startswith(header):
            lead = between.removeprefix(header)
        if self._skeleton(("user",), False) == (*before, header) and (lead is None or lead.strip()):
            raise InputError(
                f"{self.where}: the chat template writes no header for the assistant's answer (it ignores "
                "add_generation_prompt); add one to the template, or use the one of the model's instruct version"
            )
        self._header = header
        lead = lead or ""
        self.opened = ""
        for begin, end in THINKING:
            if header.rfind(begin) > header.rfind(end):
                self.opened = begin
            if (header + lead).rfind(begin) > (header + lead).rfind(end):
                lead += ("\n" if (header + lead).endswith("\n") else "\n\n") + end + "\n\n"
        control = [self._text.added[part] for part in behind if part in self._text.added]
        trail = behind[0] if behind and behind[0].isspace() and control and not control[0][1].lstrip else ""
        return lead, trail, [index for index, _ in control if index in self.control_ids]

    def _trimmed_answer(self, text: str) -> str:
        """Returns an answer as the template shows it in a conversation, but for its thinking."""
        if text == text.strip():
            return text
        roles, contents = ("user", "assistant"), (_SLOT.format(0), text)
        shown = self._shown(1, roles, contents, False, self._skeleton(roles, False))
        return shown if shown is not None and shown.strip() == text.strip() else text

    def _checked(self, options: Mapping) -> dict:
        taken = {"messages", "strftime_now", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        for name, value in options.items():
            where = f"text.chat_template_kwargs.{name}"
            if not isinstance(value, (bool, str, int, float)):
                raise InputError(f"{where}: must be true, false, a text or a number, not {value!r}")
            if name in taken or not re.search(rf"\b{re.escape(str(name))}\b", self._source):
                raise InputError(f"{where}: the chat template of {self.where} has no such option")
        return dict(options)


def _template_source(tokenizer, where: str) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: the tokenizer has no chat template; add chat_template.jinja (or the key chat_template of "
            "tokenizer_config.json) from the model's instruct version"
        )
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:  # several named ones, none of them the default
        raise InputError(
            f"{where}: the tokenizer has no default chat template: {' '.join(str(error).split())}"
        ) from None
    return _CLOCK.sub(lambda call: repr(DATE.strftime(call[2])), source)


def _slots(contents: Sequence[str]) -> list[str]:
    return [_SLOT.format(i) if content.strip() else content for i, content in enumerate(contents)]


def _fill(skeleton: Skeleton, contents: Sequence[str]) -> str:
    return "".join(part if isinstance(part, str) else contents[part] for part in skeleton)


def _unused(texts: Sequence[str]) -> str:
    """Returns a private-use character that none of the texts holds."""
    return next(c for c in map(chr, range(0xE002, 0xF900)) if not any(c in text for text in texts))
