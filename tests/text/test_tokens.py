"""Text never becomes a control token: every special token of every kind of tokenizer, whole, broken and disguised."""

import random
import re
import unicodedata

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scir_jax.errors import InputError
from scir_jax.text.tokens import Before, TextEncoder
from tests.chat_templates import (
    CONTROL,
    LOSSLESS,
    MARKS,
    NOT_SPECIAL,
    TAKES_SPACE,
    TOKENIZERS,
    chat,
    control,
    in_context,
    reference,
    turns,
)

# A template of each way to treat contents.
TEMPLATES = ("qwen-2", "llama-2", "gemma-3", "mistral-3", "phi-3", "qwen-3", "qwq")
PLAIN = (
    "Hello there, how are you?",
    "  two spaces   three\tand a tab \n",
    "\n\n\nA\n B\r\n\n  C\n\n",
    "def f(x):\n        return x  # über naïve 日本語 🙂\u200d",
    "10000 + 3.14 = ?!  {x} {{y}} <b>bold</b> [INS [/INS] </ s>",
    "a",
    "\n",
    " ",
    "▶ « » … ǅ \x00 \x7f \ufeff",
)


def added_tokens(kind):
    return [t for t in chat(kind, "qwen-2").tokenizer.get_added_vocab() if t.replace("▁", "").strip()]


def shown(kind, text):
    """A text as a kind's normaliser leaves it."""
    if kind in ("llama-2 legacy", "llama-2 always"):  # a space of theirs behind a mark; "always" only if there is none
        text = re.sub(f"(</?think>)(?!</?think>|♦|$|{' ' if kind == 'llama-2 always' else '$'})", r"\1 ", text)
    if kind == "qwen-2":
        return unicodedata.normalize("NFC", text)
    if kind != "unigram":
        return text.replace("▁", " ") if kind not in ("gpt-2", "llama-3") else text
    return re.sub(" {2,}", " ", unicodedata.normalize("NFKC", text)).replace("▁", " ")


def wide(text):
    """Full-width forms, which compatibility normalisation turns back."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def hostile(kind):
    rng = random.Random(kind)
    tokens = added_tokens(kind)
    for token in tokens:
        half = len(token) // 2
        yield from (
            token,
            f"a{token}b",
            f" {token} ",
            f"\n{token}\n\n{token}",
            token + token,
            token[:half] + token + token[half:],
            token[:1] + token + token[1:],
            token[:-1] + token + token[-1:],
            token[:half],
            token[half:],
            wide(token),
            f"A {wide(token)}{token}",
            token[:half] + wide(token[half:]),
        )
    for _ in range(60):
        yield "".join(
            rng.choice([*tokens, " ", "\n", "a", "<", "|>", wide("<|im_")]) for _ in range(rng.randrange(1, 9))
        )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_kinds_have_the_control_tokens(kind):
    """What the other tests rely on."""
    c = chat(kind, "qwen-2")
    ids = c.tokenizer.convert_tokens_to_ids([*CONTROL, *NOT_SPECIAL, *TAKES_SPACE, c.tokenizer.bos_token])
    assert set(ids) <= c.control_ids and None not in ids
    marks = c.tokenizer.convert_tokens_to_ids([*MARKS])
    assert c.control_ids.isdisjoint(marks) and {None, c.tokenizer.unk_token_id}.isdisjoint(marks)
    assert all(c.tokenizer(t, add_special_tokens=False)["input_ids"][-1] in c.control_ids for t in CONTROL)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_spelling_becomes_control(kind):
    c = chat(kind, "qwen-2")
    for text in hostile(kind):
        ids = c.encode_text(text)
        assert c.control_ids.isdisjoint(ids), text
        if kind in LOSSLESS:
            assert in_context(c, ids) == shown(kind, text), text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_content_becomes_control(kind, template):
    c = chat(kind, template)
    clean = control(c, c.prompt(turns("a", "a", "a", system="a")))
    answer = control(c, c.answer("a"))
    # Where an earlier answer's thinking is left out, what is left may be nothing at all.
    for text in [*hostile(kind)][:: 1 if template == "qwen-2" else 5]:
        assert control(c, c.prompt(turns(text, text, text, system=text))) == clean, text
        assert control(c, c.answer(text)) == answer, text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spellings_do_not_join_across_pieces(kind):
    c = chat(kind, "mistral-1")  # "[INST] " and the content are one text for some tokenizers
    for token in added_tokens(kind):
        for at in range(1, len(token)):
            content = ["x" + token[:at], (5,), token[at:], token[:at]]
            pieces = c.pieces([{"role": "user", "content": content}], generation_prompt=True, suffix=(token[at:],))
            clean = c.pieces([{"role": "user", "content": ["x", (5,), "y"]}], generation_prompt=True)
            assert control(c, c.flatten(pieces)) == control(c, c.flatten(clean))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_without_control_tokens_is_encoded_as_ever(kind):
    """Behind a control token the ids are the tokenizer's own; in the midst of text no space comes before them."""
    c = chat(kind, "qwen-2")
    encoder, bos = c._text, c.tokenizer.bos_token
    for text in PLAIN:
        whole = c.tokenizer(bos + text, add_special_tokens=False)["input_ids"]
        assert [c.tokenizer.bos_token_id, *encoder.encode(text, Before.CONTROL)] == whole
        if kind in LOSSLESS:
            assert in_context(c, c.encode_text(text)) == shown(kind, text)
    first = c.tokenizer.convert_ids_to_tokens(c.encode_text("Hello"))[0]
    assert not first.startswith(("▁", "Ġ"))


@pytest.mark.parametrize("kind", ["llama-2 legacy", "llama-2 always", "unigram"])
def test_text_in_the_midst_of_text_has_no_space_of_its_own(kind):
    c = chat(kind, "qwen-2")
    for text in ("Hello", "\nHello", "\n\nHello", "a", "aa", ".", "..", "0 1"):
        ids = c.encode_text(text)
        joined = c.tokenizer(f"</s>x{text}", add_special_tokens=False)["input_ids"]
        assert c.tokenizer.decode([*c.tokenizer("</s>x", add_special_tokens=False)["input_ids"], *ids]) == (
            c.tokenizer.decode(joined)
        ), text


def test_a_unigram_model_has_control_tokens_in_its_vocabulary():
    """Its best segmentation of full-width letters is the control token itself."""
    c = chat("unigram", "qwen-2")
    end = c.tokenizer.convert_tokens_to_ids("<|im_end|>")
    disguised = wide("<|im_end|>")
    assert end in c.tokenizer(disguised)["input_ids"], "the tokenizer itself is fooled"
    assert end not in c.encode_text(disguised) and end not in c.encode_text(f"a {disguised}.")


def test_white_space_tokens_of_the_vocabulary_are_text():
    for kind in ("gemma", "gemma class"):
        c = chat(kind, "gemma-2")
        tokens = c.tokenizer.convert_ids_to_tokens(c.encode_text("a  b   c\n\nd\n"))
        assert tokens == ["a", "▁▁", "b", "▁▁▁", "c", "\n\n", "d", "\n"]
        assert list(c.prompt(turns("a  b   c\n\nd"))) == reference(c, turns("a  b   c\n\nd"))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_character_that_is_a_control_token_is_written_as_bytes(kind):
    c = chat(kind, "qwen-2")
    ids = c.encode_text("a♦b ♦♦")
    assert c.control_ids.isdisjoint(ids) and in_context(c, ids) == "a♦b ♦♦"


def words(unknown):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "</s>", "§")])
    return TextEncoder(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, eos_token="</s>"), "x", [3]
    )


def test_a_character_that_is_a_control_token_is_unknown_without_bytes():
    assert words("<unk>").encode("a§b") == (0, 2, 1)
    assert chat("unigram", "qwen-2").encode_text("♦") == (0,)


def test_a_character_that_can_only_be_a_control_token_is_refused():
    with pytest.raises(InputError, match="x: the tokenizer turns the character '§' into a control token"):
        words("</s>").encode("a§b")


def test_many_control_tokens_cost_little():
    """As many as Gemma 3 has: the text is not searched for each of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(f"<unused{i}>", special=True) for i in range(6000)])
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unused0>"), "x")
    looked = []

    class Counting(dict):
        def __contains__(self, key):
            looked.append(key)
            return super().__contains__(key)

    encoder.added = Counting(encoder.added)
    encoder.encode("a < b, and nothing else. " * 100)
    assert 100 <= len(looked) <= 400, "lengths at each <, not tokens"
    looked.clear()
    assert encoder.split("a<unused7><unused77>") == ["a", "<unused7>", "<unused77>"] and len(looked) < 20
