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
_SLOT_PATTERN = re.compile("(\ue000\\d+\ue001)")

Ids = tuple[int, ...]
Content = str | Sequence["str | Ids"]
"""A message's content: text, or pieces of text and of finished ids."""


def load_tokenizer(directory: Path):
    """The tokenizer of a Hugging Face directory, without torch and without remote code.

    Raises InputError if the directory has none that loads.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
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
        added = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        self._added = added
        # The unknown token is what harmless text may become; every other added token is control.
        self.control_ids = {index for index, _ in added.values()} - {tokenizer.unk_token_id}
        self._control_texts = sorted((t for t, (i, _) in added.items() if i in self.control_ids), key=len, reverse=True)
        plain = [t for t, (i, token) in added.items() if token.special and not (token.lstrip or token.rstrip)]
        self._anchor = next((t for t in plain if t in (tokenizer.bos_token, tokenizer.eos_token)), plain[0] if plain else None)
        stops = list(dict.fromkeys(i for i in (*stop_ids, tokenizer.eos_token_id) if i is not None))
        closing = self._closing_stop(stops)
        if closing is not None:
            stops = [closing, *(s for s in stops if s != closing)]
        if not stops:
            raise InputError(f"{where}: neither generation_config.json nor the tokenizer names an end-of-sequence token")
        self.stop_ids: Ids = tuple(stops)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]

    # --- text -------------------------------------------------------------------------------------------------------

    def encode_text(self, text: str, *, first: bool = False) -> Ids:
        """Ids of plain text; no control token, whatever the text spells.

        Args:
          first: the text opens the sequence (some tokenizers mark the start of a text).
        """
        if not text:
            return ()
        for control in self._control_texts:
            # Broken after its first character, the spelling of a control token is text like any other.
            if (at := text.find(control)) >= 0:
                return self.encode_text(text[: at + 1], first=first) + self.encode_text(text[at + 1 :])
        ids = self._encode(text, first)
        if self.control_ids.isdisjoint(ids):
            return ids
        # The tokenizer's normaliser made a control token of other characters (full-width letters, say).
        if len(text) == 1:
            raise InputError(f"{self.where}: the tokenizer turns the character {text!r} into a control token")
        half = len(text) // 2
        return self.encode_text(text[:half], first=first) + self.encode_text(text[half:])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of response ids without their stop token; control tokens inside are spelled out."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _encode(self, text: str, first: bool) -> Ids:
        if first or self._anchor is None:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # Behind an anchor the tokenizer does not take the text for the start of a sequence (SentencePiece's space).
        return tuple(self.tokenizer(self._anchor + text, add_special_tokens=False)["input_ids"][1:])

    # --- conversations ----------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[dict]) -> Ids:
        """Ids of a conversation up to where the assistant's answer begins."""
        return self.flatten(self.pieces(messages, generation_prompt=True))

    def answer(self, text: str) -> Ids:
        """Ids of a complete assistant's answer, with its stop token."""
        return self.encode_text(text) + self.stop_ids[:1]

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

        def flush() -> None:
            result.append(self.encode_text("".join(run), first=not any(result)))
            run.clear()

        for part in _SLOT_PATTERN.split(self.render(messages, generation_prompt=generation_prompt)):
            if _SLOT_PATTERN.fullmatch(part):
                message = messages[int(part[1:-1])]
                content = message["content"]
                own = message["role"] == "assistant"
                for item in [content] if isinstance(content, str) else content:
                    if isinstance(item, str) and not own:
                        run.append(item)
                    else:
                        flush()
                        result.append(self.encode_text(item) if isinstance(item, str) else tuple(item))
            else:
                self._template_text(part, run, result, flush)
        run.append(suffix)
        flush()
        return [piece for piece in result if piece]

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

    def _template_text(self, text: str, run: list[str], result: list[Ids], flush) -> None:
        strip_next = False
        for part in self._added_pattern.split(text) if self._added_pattern else [text]:
            if part in self._added:
                index, token = self._added[part]
                if token.lstrip and run:
                    run[-1] = run[-1].rstrip()
                flush()
                result.append((index,))
                strip_next = token.rstrip
            elif part:
                run.append(part.lstrip() if strip_next else part)
                strip_next = False

    def _closing_stop(self, stops: Sequence[int]) -> int | None:
        """The stop token that the template itself writes after an assistant's answer."""
        pieces = self.pieces(
            [{"role": "user", "content": [(-1,)]}, {"role": "assistant", "content": [(-2,)]}], generation_prompt=False
        )
        tail = self.flatten(pieces[pieces.index((-2,)) + 1 :])
        return next((i for i in tail if i in stops), next((i for i in tail if i in self.control_ids), None))
