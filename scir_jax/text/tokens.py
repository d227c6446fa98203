"""Text to token ids that hold no control token, and template text to ids that may.

Who wrote a text decides what it can become: a template's author may spell control tokens, users and models may not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cached_property, lru_cache

from tokenizers import pre_tokenizers

from scir_jax.errors import InputError

Ids = tuple[int, ...]

# The beginning and the end of a thinking block, of Qwen and DeepSeek, and of Mistral.
THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
THINKING_MARKS = tuple(mark for block in THINKING for mark in block)


class Before(Enum):
    """What a text stands behind; some tokenizers mark the beginning of a text with a space."""

    NOTHING = 0
    CONTROL = 1
    TEXT = 2


class TextEncoder:
    """A tokenizer's view on text.

    Attributes:
      added: the control tokens among the added tokens by spelling, (id, token) each.
      control_ids: ids that no text of users or models becomes.
    """

    def __init__(self, tokenizer, where: str, stop_ids: Sequence[int] = ()):
        """
        Args:
          where: names the tokenizer in errors.
          stop_ids: an unknown token among them, or one that the tokenizer's model does not write, is a control token;
            else it is what harmless text may become.
        """
        self.tokenizer = tokenizer
        self.where = where
        # Of added tokens that are not special, runs of white space (Gemma, Phi) only shorten text, and the marks of a
        # thinking block (Qwen) are text of a model; all others are control, whatever their flag says.
        self.added = {
            token.content: (index, token)
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content.replace("▁", " ").strip() and token.content not in THINKING_MARKS
        }
        self.control_ids = {index for index, _ in self.added.values()}
        model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
        if getattr(model, "unk_token", tokenizer.unk_token) and tokenizer.unk_token_id not in (
            *stop_ids,
            tokenizer.bos_token_id,
        ):
            self.control_ids.discard(tokenizer.unk_token_id)
        plain = [t for t, (_, token) in self.added.items() if token.special and not (token.lstrip or token.rstrip)]
        control = next((t for t in plain if t in (tokenizer.bos_token, tokenizer.eos_token)), plain[0] if plain else "")
        # A text is encoded behind a context whose ids are cut off again. Where they are no prefix of the ids of both,
        # the text's first token reaches into the context, and the next context is tried.
        self._contexts = {Before.NOTHING: ("",), Before.CONTROL: (control, ""), Before.TEXT: (control, "")}
        self._context_ids: dict[str, Ids] = {}
        self._direct = False
        self._recent = lru_cache(1024)(self._written)  # a template's headers come again and again
        if any(t[0] in "▁Ġ" for t in tokenizer.convert_ids_to_tokens(self._encode("a", Before.CONTROL))[:1]):
            # This tokenizer puts a space before text behind a control token, but not before text behind text.
            texts = tuple(control + text for text in "\n.a0)é")
            self._contexts[Before.TEXT] = (*texts, control, "")

    def encode(self, text: str, before: Before = Before.TEXT) -> Ids:
        """Returns the ids of plain text; no control token, whatever the text spells.

        Raises:
          InputError: the tokenizer can only write a character as a control token.
        """
        return self._recent(text, before)

    def _written(self, text: str, before: Before) -> Ids:
        result: list[int] = []
        start = 0
        # Broken behind its first character, the spelling of a control token is text like any other.
        for end in [*(start + 1 for start, _ in self._found(text)), len(text)]:
            if start < end:
                result += self._plain(text[start:end], Before.TEXT if start else before)
                start = end
        return tuple(result)

    def split(self, text: str) -> list[str]:
        """Splits a text so that the added tokens that it spells are parts of their own (members of `added`)."""
        parts: list[str] = []
        end = 0
        for start, token in self._found(text):
            if start >= end:
                parts += [text[end:start], token]
                end = start + len(token)
        return [part for part in (*parts, text[end:]) if part]

    def spelled(self, text: str) -> Counter[str]:
        """Counts how often a text spells each added token."""
        return Counter(part for part in self.split(text) if part in self.added)

    @cached_property
    def _first_characters(self) -> re.Pattern:
        firsts = "".join(sorted({re.escape(text[0]) for text in self.added}))
        return re.compile(f"[{firsts}]" if firsts else r"(?!)")

    @cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """The lengths of the added tokens that begin with a character, the longest first."""
        firsts = {text[0] for text in self.added}
        return {first: sorted({len(t) for t in self.added if t[0] == first}, reverse=True) for first in firsts}

    def _found(self, text: str) -> Iterator[tuple[int, str]]:
        """Finds each place where the text spells an added token, overlapping ones too, with the longest one there.

        Some tokenizers have thousands of added tokens: the text is not compared with each.
        """
        for match in self._first_characters.finditer(text):
            start = match.start()
            for length in self._lengths[text[start]]:
                if text[start : start + length] in self.added:
                    yield start, text[start : start + length]
                    break

    def _plain(self, text: str, before: Before) -> Ids:
        ids = self._encode(text, before)
        if self.control_ids.isdisjoint(ids):
            return ids
        # A character that is a control token, or other characters (full-width letters, say) that the tokenizer's
        # normaliser turns into one.
        if len(text) == 1:
            return self._character(text)
        half = len(text) // 2
        return self._plain(text[:half], before) + self._plain(text[half:], Before.TEXT)

    def _character(self, character: str) -> Ids:
        """Returns the ids of a character that would become a control token: its bytes, or the unknown token."""
        byte_fallback = [f"<0x{byte:02X}>" for byte in character.encode("utf-8", "surrogatepass")]
        byte_level = list(pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(character)[0][0])
        vocabulary = self.tokenizer.get_vocab()
        for tokens in (byte_fallback, byte_level):
            ids = tuple(vocabulary.get(token, -1) for token in tokens)
            if -1 in ids or not self.control_ids.isdisjoint(ids):
                continue
            if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == character:
                return ids
        unknown = self.tokenizer.unk_token_id
        if unknown is None or unknown in self.control_ids:
            raise InputError(
                f"{self.where}: the tokenizer turns the character {character!r} into a control token; take it out of "
                "the text"
            )
        return (unknown,)

    def _encode(self, text: str, before: Before) -> Ids:
        for context in self._contexts[before]:
            if context not in self._context_ids:
                self._context_ids[context] = self._tokenize(context)
            prefix, ids = self._context_ids[context], self._tokenize(context + text)
            if ids[: len(prefix)] == prefix:
                return ids[len(prefix) :]
        raise AssertionError("the empty context is a prefix of anything")

    def _tokenize(self, text: str) -> Ids:
        if not self._direct:
            # The first call also puts the backend's own truncation, padding and special tokens aside.
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            self._direct = getattr(self.tokenizer, "is_fast", False)
            return ids
        # Short texts take several times as long through the tokenizer's own call.
        return tuple(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


class Writer:
    """Puts template text, plain text and finished ids one behind another.

    Neighbouring texts are tokenised together, as one rendered string would be; ids are pieces of their own.
    """

    def __init__(self, encoder: TextEncoder, state: tuple[Before, bool] = (Before.NOTHING, False)):
        """
        Args:
          state: the `state` of a writer to go on from.
        """
        self._encoder = encoder
        self._before, self._strip = state
        self._run: list[str] = []
        self._pieces: list[Ids] = []

    @property
    def state(self) -> tuple[Before, bool]:
        """What stands before, and whether it takes the white space that follows. Call after `finish`."""
        return self._before, self._strip

    def template(self, text: str) -> None:
        """Adds text of a template's author; added tokens that it spells become their ids."""
        for part in self._encoder.split(text):
            if part not in self._encoder.added:
                self.text(part)
                continue
            index, token = self._encoder.added[part]
            if token.lstrip:
                self._run = ["".join(self._run).rstrip()]
            self._add((index,), Before.CONTROL)
            self._strip = token.rstrip

    def text(self, text: str) -> None:
        """Adds text of users and models."""
        if self._strip:
            text = text.lstrip()
        if text:
            self._run.append(text)
            self._strip = False

    def ids(self, ids: Sequence[int]) -> None:
        """Adds finished ids."""
        if ids:
            self._add(tuple(ids), Before.TEXT)
            self._strip = False

    def finish(self) -> list[Ids]:
        """Returns the pieces."""
        self._flush()
        return self._pieces

    def _add(self, ids: Ids, before: Before) -> None:
        self._flush()
        self._pieces.append(ids)
        self._before = before

    def _flush(self) -> None:
        if text := "".join(self._run):
            self._pieces.append(self._encoder.encode(text, self._before))
            self._before = Before.TEXT
        self._run.clear()
