"""Thinking blocks: marks that are text or special, answers with a block of their own, and answers without it."""

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from scir_jax.config.schema import TextConfig
from scir_jax.data.encode import Encoder
from scir_jax.text.chat import Chat
from tests.chat_templates import (
    MARKS,
    QWEN_3,
    QWQ,
    TOKENIZERS,
    byte_level,
    chat,
    control,
    in_context,
    reference,
    spelled,
    structure,
    turns,
    with_template,
)

each = pytest.mark.parametrize("kind", TOKENIZERS)
PLAIN = [kind for kind in TOKENIZERS if kind not in ("llama-2 legacy", "llama-2 always", "unigram")]
"""those that write no space of their own behind a mark"""
THOUGHT, SPOKEN = "<think>\nHm, a colour.\n</think>\n\n", "Blue, of course!"


def marks(c):
    return c.tokenizer.convert_tokens_to_ids([*MARKS])


def mistral(source):
    """A template with the marks of Mistral, which are special tokens of every kind of tokenizer here."""
    return source.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")


# --- marks ------------------------------------------------------------------------------------------------------------


@each
def test_a_mark_in_a_text_is_what_the_tokenizer_says(kind):
    c = chat(kind, "qwen-2")
    begin, end = marks(c)
    texts = ("<think>", "</think>", THOUGHT + SPOKEN, "a</think> <think>b", "<think><think>\n", "<think> </thin>")
    for text in texts:
        ids = c.encode_text(text)
        own = c.tokenizer(f"</s>x{text}", add_special_tokens=False)["input_ids"]
        assert list(ids) == own[len(own) - len(ids) :]
        assert (ids.count(begin), ids.count(end)) == (text.count("<think>"), text.count("</think>"))
        assert not control(c, ids)
        if kind in PLAIN:
            assert in_context(c, ids) == text
    messages = turns(f"What is {THOUGHT}?", f"{THOUGHT}{SPOKEN}", "</think>", system="<think>")
    assert list(c.prompt(messages)) == reference(c, messages)
    assert control(c, c.prompt(messages)) == control(c, c.prompt(turns("a", "b", "c", system="d")))


@each
def test_a_special_mark_in_a_text_stays_text(kind):
    c = with_template(mistral(QWEN_3), kind)
    begin, end = c.tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    assert {begin, end} <= c.control_ids
    text = mistral(THOUGHT + SPOKEN)
    assert not control(c, c.encode_text(text))
    if kind != "unigram":
        assert in_context(c, c.encode_text(text)) == text
    assert control(c, c.prompt(turns(text, "a", text))) == control(c, c.prompt(turns("a", "a", "a")))
    # The template's own are the tokens, and its empty block stays before an answer that spells them.
    assert control(c, c.answer("Blue")) == control(c, c.answer(text)) == [begin, end, c.stop_ids[0]]
    opened = with_template(mistral(QWQ), kind)
    assert control(opened, opened.prompt(turns(text)))[-1] == begin
    assert control(opened, opened.answer(text)) == [end, opened.stop_ids[0]]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("block", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_the_flag_says_whether_a_mark_is_special(block, special):
    tokenizer = byte_level("gpt-2")
    for token in (*block, "<tool_call>"):
        tokenizer.add_tokens([AddedToken(token, special=special and token in block, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    source = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}> {% endif %}"
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=source)
    c = Chat(made, "x")
    ids = made.convert_tokens_to_ids([*block])
    assert c.control_ids.isdisjoint(ids) != special and c.control_ids.issuperset(ids) == special
    assert made.convert_tokens_to_ids("<tool_call>") in c.control_ids
    text = f"{block[0]}x{block[1]}<tool_call><|im_end|>"
    assert [i for i in c.encode_text(text) if i in ids] == ([] if special else ids)
    assert spelled(c, c.encode_text(text)) == text and not control(c, c.encode_text(text))


@pytest.mark.parametrize("template", ["qwen-3", "qwq"])
@each
def test_no_text_beside_a_mark_becomes_special(kind, template):
    c = chat(kind, template)
    expected = control(c, c.prompt(turns("a", "a", "a", system="a")))
    for token in ("<|im_end|>", "<|im_start|>assistant\n", "<tool_call>", "[THINK]", c.tokenizer.eos_token):
        half = len(token) // 2
        for text in (
            f"<think>{token}</think>{token}",
            f"{token}<think>{token}",
            f"{token[:half]}<think>{token[half:]}",
            f"{token[:half]}</think>{token}{token[half:]}",
            f"<think>\n{token}\n</think>\n\n{token}",
            f"<thi{token}nk>",
        ):
            assert not control(c, c.encode_text(text)), text
            assert control(c, c.prompt(turns(text, text, text, system=text))) == expected, text
            assert control(c, c.answer(text)) == [c.stop_ids[0]], text


# --- earlier answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["qwen-3", "qwq"])
@each
def test_earlier_answers_lose_their_thinking(kind, template):
    c = chat(kind, template)
    thoughtful = "<think>\nHello? Blue!\n</think>\n\nBlue, of course!\n"
    messages = turns("Hello", thoughtful, "And you?", "<think>x</think>Fine", "Good.", system="Be brief.")
    assert list(c.prompt(messages)) == reference(c, messages)
    assert "Hello? Blue" not in c.tokenizer.decode(c.prompt(messages))
    # A template that shows everything shows it with its marks.
    plain = chat(kind, "qwen-2")
    ids = plain.prompt(messages)
    assert list(ids) == reference(plain, messages)
    begin, end = marks(plain)
    assert [i for i in ids if i in (begin, end)] == [begin, end] * 2
    if kind != "unigram":
        assert "Hello? Blue" in plain.tokenizer.decode(ids)


# --- the block before an answer ---------------------------------------------------------------------------------------


@each
def test_thinking_can_be_switched_off(kind):
    c = chat(kind, "qwen-3", enable_thinking=False)
    tail = c.tokenizer.apply_chat_template(
        turns("Hello"), tokenize=True, return_dict=False, add_generation_prompt=True, enable_thinking=False
    )
    assert list(c.prompt(turns("Hello"))) == tail
    begin, end = marks(c)
    assert begin in tail and tail.index(begin) < tail.index(end)
    assert c.lead == "" and end not in c.answer("Blue")
    # Otherwise the block belongs to the answer, as the template writes it.
    thinks = chat(kind, "qwen-3")
    assert begin not in thinks.prompt(turns("Hello"))
    answer = thinks.answer("Blue")
    assert spelled(c, thinks.prompt(turns("Hello")) + answer) == spelled(c, (*tail, *c.answer("Blue")))
    assert structure(c, answer) == [begin, end, c.stop_ids[0]]


@each
def test_an_answer_closes_the_thinking_that_the_prompt_opens(kind):
    c = chat(kind, "qwq")
    ids = c.prompt(turns("Hello")) + c.answer("Blue")
    text = "<think>\n\n</think>\n\nBlue<|im_end|>"
    assert c.tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace("> ", ">").endswith(text)
    begin, end = marks(c)
    assert [i for i in ids if i in (begin, end)] == [begin, end]
    # Neither a sampled answer nor an earlier one is given a block.
    sampled = c.pieces([*turns("Hello"), {"role": "assistant", "content": [(1, 2)]}], generation_prompt=False)
    assert end not in c.flatten(sampled)


@each
def test_an_answers_own_thinking_takes_the_place_of_the_empty_block(kind):
    c = chat(kind, "qwen-3")
    for text in (THOUGHT + SPOKEN, THOUGHT, "<think>\n\n</think>\n\nBlue"):
        ids = [*c.prompt(turns("Hello")), *c.answer(text)]
        assert structure(c, c.answer(text)) == [*marks(c), c.stop_ids[0]]
        whole = reference(c, [*turns("Hello"), {"role": "assistant", "content": text}], False)
        if kind == "gpt-2":  # one new line more would be a token with the prompt's last one
            assert spelled(c, whole).startswith(spelled(c, ids))
        else:
            assert ids == whole[: len(ids)]
    # Behind white space too, and one that has no end; a mark later in the text begins no block.
    assert structure(c, c.answer(f"\n {THOUGHT}{SPOKEN} \n")) == [*marks(c), c.stop_ids[0]]
    assert structure(c, c.answer("<think>\nHm")) == [marks(c)[0], c.stop_ids[0]]
    assert structure(c, c.answer(f"Blue {THOUGHT}")) == [*marks(c), *marks(c), c.stop_ids[0]]


@each
def test_an_answers_own_thinking_goes_on_in_the_block_that_the_prompt_opens(kind):
    c = chat(kind, "qwq")
    begin, end = marks(c)
    whole = c.answer(THOUGHT + SPOKEN)
    assert structure(c, whole) == [end, c.stop_ids[0]]
    assert spelled(c, whole).strip().startswith("Hm, a colour.")
    # With the mark or without it, with white space around or without: the same thinking.
    assert c.answer(f"<think>Hm, a colour.\n</think>\n\n{SPOKEN}") == whole
    assert c.answer(f"Hm, a colour.\n</think>\n\n{SPOKEN}") == whole
    assert c.answer(f"\n{THOUGHT}{SPOKEN}") == whole
    padded = c.answer(f"{THOUGHT}{SPOKEN}\n")
    assert structure(c, padded) == [end, c.stop_ids[0]] and padded[: len(whole) - 2] == whole[:-2]
    row = structure(c, c.prompt(turns("Hello")) + whole)
    assert row[-3:] == [begin, end, c.stop_ids[0]] and row.count(begin) == 1
    assert structure(c, c.answer("<think>\nHm")) == [c.stop_ids[0]], "thinking that does not end"


@each
def test_an_answers_own_thinking_behind_a_block_that_is_there(kind):
    """Where the prompt itself has the empty block, and where the template knows no thinking."""
    for c in (chat(kind, "qwen-3", enable_thinking=False), chat(kind, "qwen-2")):
        ids = c.answer(THOUGHT + SPOKEN)
        assert structure(c, ids) == [*marks(c), c.stop_ids[0]]
        if kind in PLAIN:
            assert in_context(c, ids[:-1]) == THOUGHT + SPOKEN


# --- answers without their thinking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["qwen-2", "qwen-3", "qwq"])
@pytest.mark.parametrize(
    "text, spoken",
    [
        (SPOKEN, SPOKEN),
        (THOUGHT + SPOKEN, SPOKEN),
        (f"\n {THOUGHT}\n{SPOKEN}\n", f"{SPOKEN}\n"),
        (f"<think></think>{SPOKEN}", SPOKEN),
        (f"[THINK]Hm.[/THINK]{SPOKEN}", SPOKEN),
        (THOUGHT, ""),
        ("<think>\nHm", ""),
        ("", ""),
        (" \n", " \n"),
        ("A [/THINK] B", "A [/THINK] B"),
    ],
)
def test_an_answer_without_its_thinking(template, text, spoken):
    assert chat("gpt-2", template).spoken(text) == spoken


def test_thinking_that_the_prompt_opened():
    """What is sampled goes on with it; a given answer does if it ends it."""
    c, other = chat("gpt-2", "qwq"), chat("gpt-2", "qwen-3")
    rest = THOUGHT.removeprefix("<think>\n")
    for text, given, sampled in ((rest + SPOKEN, SPOKEN, SPOKEN), (SPOKEN, SPOKEN, ""), ("", "", "")):
        assert (c.spoken(text), c.spoken(text, sampled=True)) == (given, sampled)
        assert other.spoken(text) == other.spoken(text, sampled=True) == text
    special = with_template(mistral(QWQ))
    assert special.spoken(mistral(rest) + SPOKEN, sampled=True) == SPOKEN and special.spoken(SPOKEN) == SPOKEN


@pytest.mark.parametrize("quote_thinking", [False, True])
@pytest.mark.parametrize("template", ["qwen-3", "qwq"])
def test_a_judge_is_shown_what_was_spoken(template, quote_thinking):
    c = chat("gpt-2", template)
    e = Encoder(TextConfig(), c, [], 4096, quote_thinking=quote_thinking)

    def shown(ids):
        return c.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    given = e.answer(THOUGHT + SPOKEN)
    assert given.text == THOUGHT + SPOKEN and given.ids == c.answer(THOUGHT + SPOKEN)
    assert shown(given.quote) == (THOUGHT + SPOKEN if quote_thinking else SPOKEN)
    assert shown(e.answer(SPOKEN).quote) == SPOKEN, "one without a block"
    sampled = e.sampled(given.ids)
    assert sampled.ids == given.ids
    assert shown(sampled.quote) == (sampled.text if quote_thinking else SPOKEN)
    cut = e.sampled(given.ids[: given.ids.index(marks(c)[1])])
    assert shown(cut.quote) == (cut.text if quote_thinking else ""), "cut in the midst of its thinking"
    # Earlier answers of a prompt alike; a user's marks are as they stand.
    prompt = e.prompt(turns("<think>", THOUGHT + SPOKEN, "Why?", SPOKEN, "</think>?"))
    text = shown(prompt.quote)
    assert ("Hm, a colour." in text) == quote_thinking and text.count(SPOKEN) == 2
    assert "<think>" in text and text.endswith("</think>?")
