"""Conversations to token ids.

A chat template is rendered once with place-holders, so that its own text (which may spell control tokens) and the
text of users and models (which may not) stay apart until both are ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from scir_jax.errors import InputError

# Private-use characters around a message's number; a template passes them through untouched.
_SLOT = "\ue000{}\ue001"
_SLOT_PATTERN = re.compile("\ue000(\\d+)\ue001")

Ids = tuple[int, ...]
Content = str | Sequence["str | Ids"]
"""A message's content: text, or pieces of text and of finished ids."""


def load_tokenizer(directory: Path):
    """The tokenizer of a Hugging Face directory, without torch and without remote code.

    Raises InputError if the directory has none that loads.
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
      lead: white space that the template writes between a prompt and its answer.
      stop_ids: tokens that end an assistant's turn, the first one is written after a given answer.
      pad_id: fills rows; never looked at.
    """

    def __init__(self, tokenizer, where: str, stop_ids: Sequence[int] = ()):
        if not tokenizer.chat_template:
            raise InputError(
                f"{where}: the tokenizer has no chat template; add chat_template.jinja (or the key chat_template of "
                "tokenizer_config.json) from the model's instruct version"
            )
        self.tokenizer = tokenizer
        self.where = where
        # Added runs of white space that are not special (Gemma, Phi) only shorten text; other added tokens are control.
        self._added = {
            token.content: (index, token)
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content.strip()
        }
        stops = list(dict.fromkeys(i for i in (*stop_ids, tokenizer.eos_token_id) if i is not None))
        self.control_ids = {index for index, _ in self._added.values()}
        if tokenizer.unk_token_id not in (*stops, tokenizer.bos_token_id):
            self.control_ids.discard(tokenizer.unk_token_id)  # what harmless text may become
        # What a text may stand behind: nothing, a control token, or other text.
        plain = [t for t, (_, token) in self._added.items() if token.special and not (token.lstrip or token.rstrip)]
        self._control = next(
            (t for t in plain if t in (tokenizer.bos_token, tokenizer.eos_token)), plain[0] if plain else ""
        )
        self._text = self._control
        self._context_ids: dict[str, Ids] = {}
        if any(t[0] in "▁Ġ" for t in tokenizer.convert_ids_to_tokens(self._encode("a", self._control))[:1]):
            # This tokenizer puts a space before text behind a control token, but not before text behind text.
            self._text = self._control + "\n"
        self.lead = self._trail = ""
        closing = self._closing_stop(stops)
        if closing is not None:
            stops = [closing, *(s for s in stops if s != closing)]
        if not stops:
            raise InputError(
                f"{where}: neither generation_config.json nor the tokenizer names an end-of-sequence token"
            )
        self.stop_ids: Ids = tuple(stops)
        self.lead, self._trail, self._answer_before = self._around_answer()
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]

    # --- text -------------------------------------------------------------------------------------------------------

    def encode_text(self, text: str, *, before: str | None = None) -> Ids:
        """Ids of plain text; no control token, whatever the text spells.

        Args:
          before: what the text stands behind, which some tokenizers mark; other text by default.
        """
        result: list[int] = []
        start = 0
        for end in [*self._control_spellings(text), len(text)]:
            if start < end:
                result += self._encode_plain(text[start:end], self._text if start or before is None else before)
                start = end
        return tuple(result)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of response ids without their stop token; control tokens inside are spelled out."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _control_spellings(self, text: str) -> list[int]:
        """Places behind the first character of each control token that the text spells, overlapping ones too.

        Broken there, the spelling of a control token is text like any other.
        """
        return [match.start() + 1 for match in self._control_starts.finditer(text)] if self._control_starts else []

    def _encode_plain(self, text: str, before: str) -> Ids:
        ids = self._encode(text, before)
        if self.control_ids.isdisjoint(ids):
            return ids
        # The tokenizer's normaliser made a control token of other characters (full-width letters, say).
        if len(text) == 1:
            raise InputError(f"{self.where}: the tokenizer turns the character {text!r} into a control token")
        half = len(text) // 2
        return self._encode_plain(text[:half], before) + self._encode_plain(text[half:], self._text)

    def _encode(self, text: str, before: str) -> Ids:
        for context in dict.fromkeys((before, self._control, "")):
            if context not in self._context_ids:
                self._context_ids[context] = self._tokenize(context)
            prefix, ids = self._context_ids[context], self._tokenize(context + text)
            if ids[: len(prefix)] == prefix:
                return ids[len(prefix) :]
            # Else the text's first token reaches into the context.
        raise AssertionError("the empty context is a prefix of anything")

    def _tokenize(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # --- conversations ----------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[dict]) -> Ids:
        """Ids of a conversation up to where the assistant's answer begins."""
        return self.flatten(self.pieces(messages, generation_prompt=True))

    def answer(self, text: str) -> Ids:
        """Ids of a complete assistant's answer, with its stop token."""
        return self._answer_text(text, self._answer_before) + self.stop_ids[:1]

    @staticmethod
    def flatten(pieces: Sequence[Ids]) -> Ids:
        return tuple(i for piece in pieces for i in piece)

    def pieces(self, messages: Sequence[dict], *, generation_prompt: bool, suffix: str = "") -> list[Ids]:
        """Ids of a conversation; contents given as ids, and assistants' texts, are pieces of their own.

        Plain template text and the contents of other roles are tokenised together, as the whole rendered text would
        be; control tokens come from the template alone.

        Args:
          messages: role and content each; a content is text, or text and id tuples in turn.
          suffix: text behind the rendered template, tokenised together with the template's last text.
        """
        result: list[Ids] = []
        run: list[str] = []
        before = ""

        def flush() -> None:
            nonlocal before
            if text := "".join(run):
                result.append(self.encode_text(text, before=before))
                before = self._text
            run.clear()

        def add(ids: Ids, behind: str) -> None:
            nonlocal before
            if ids:
                result.append(ids)
                before = behind

        # Template texts at even places, between them the numbers of the messages.
        parts = _SLOT_PATTERN.split(self.render(messages, generation_prompt=generation_prompt))
        for place, part in enumerate(parts):
            if place % 2 == 0:
                if place and messages[int(parts[place - 1])]["role"] == "assistant":
                    part = part.removeprefix(self._trail)
                if place + 1 < len(parts) and messages[int(parts[place + 1])]["role"] == "assistant":
                    part = part.removesuffix(self.lead)
                self._template_text(part, run, flush, add)
                continue
            message = messages[int(part)]
            content = message["content"]
            for item in [content] if isinstance(content, str) else content:
                if not isinstance(item, str):
                    flush()
                    add(tuple(item), self._text)
                elif message["role"] == "assistant":
                    flush()
                    add(self._answer_text(item, before), self._text)
                else:
                    run.append(item)
        run.append(suffix)
        flush()
        return result

    def render(self, messages: Sequence[dict], *, generation_prompt: bool) -> str:
        """The chat template's text with a numbered place-holder for each content."""
        slots = [{**m, "content": _SLOT.format(i)} for i, m in enumerate(messages)]
        try:
            text = self.tokenizer.apply_chat_template(slots, tokenize=False, add_generation_prompt=generation_prompt)
        except Exception as error:  # the template's own raise_exception, or a Jinja error
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise InputError(f"{self.where}: the chat template refuses a conversation of ({roles}): {error}") from None
        missing = [i for i in range(len(messages)) if _SLOT.format(i) not in text]
        if missing:
            raise InputError(f"{self.where}: the chat template leaves out the content of message {missing[0]}")
        return text

    @cached_property
    def _added_pattern(self) -> re.Pattern | None:
        texts = sorted(self._added, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None

    @cached_property
    def _control_starts(self) -> re.Pattern | None:
        return re.compile(f"(?={self._added_pattern.pattern})") if self._added_pattern else None

    def _template_text(self, text: str, run: list[str], flush, add) -> None:
        strip_next = False
        for part in self._added_pattern.split(text) if self._added_pattern else [text]:
            if part in self._added:
                index, token = self._added[part]
                if token.lstrip and run:
                    run[-1] = run[-1].rstrip()
                flush()
                add((index,), self._control)
                strip_next = token.rstrip
            elif part:
                run.append(part.lstrip() if strip_next else part)
                strip_next = False

    def _answer_text(self, text: str, before: str) -> Ids:
        return self.encode_text(self.lead + text + self._trail, before=before)

    def _around_answer(self) -> tuple[str, str, str]:
        """White space that the template puts around an answer, and what the two stand behind.

        Llama 2 and Mistral write "[/INST] answer </s>", but end the prompt at "[/INST]": the spaces are the model's to
        sample, so they belong to the answer.
        """
        user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
        prompt = self.render([user], generation_prompt=True)
        whole = self.render([user, assistant], generation_prompt=False)
        lead = trail = ""
        if whole.startswith(prompt):
            lead, _, rest = whole[len(prompt) :].partition(_SLOT.format(1))
            trail, *closing = self._added_pattern.split(rest, maxsplit=1) if self._added_pattern else [rest]
            lead = lead if lead.isspace() else ""
            if not trail.isspace() or not closing or self._added[closing[0]][1].lstrip:
                trail = ""
        behind_control = self._added_pattern is not None and self._added_pattern.split(prompt)[-1] == ""
        return lead, trail, self._control if behind_control else self._text

    def _closing_stop(self, stops: Sequence[int]) -> int | None:
        """The stop token that the template itself writes after an assistant's answer."""
        pieces = self.pieces(
            [{"role": "user", "content": [(-1,)]}, {"role": "assistant", "content": [(-2,)]}], generation_prompt=False
        )
        tail = self.flatten(pieces[pieces.index((-2,)) + 1 :])
        return next((i for i in tail if i in stops), next((i for i in tail if i in self.control_ids), None))
