"""Prompts, answers and judge questions within a run's lengths, on small tokenizers of the three common kinds."""

import pytest

from scir_jax.data.encode import middle_cut
from scir_jax.data.records import Comparison
from scir_jax.errors import InputError
from tests.chat_templates import turns
from tests.text.common import TOKENIZERS, chat, control, encoder, judge, reference

LONG = turns("Name a colour. " * 40 + "Thanks")


def test_middle_cut():
    ids = tuple(range(10))
    assert middle_cut(ids, 10) == ids and middle_cut(ids, 4) == (0, 1, 8, 9) and middle_cut(ids, 5) == (0, 1, 7, 8, 9)


def test_long_prompts_lose_their_middle():
    e = encoder("chatml", max_prompt_tokens=24, long_prompts="middle")
    whole, cut = chat("chatml").prompt(LONG), e.prompt(LONG)
    assert len(whole) > 100 and len(cut.ids) == 24
    assert cut.ids[:12] == whole[:12] and cut.ids[-12:] == whole[-12:]
    assert len(cut.quote) == 24 and cut.cut
    short = e.prompt(turns("Hello"))
    assert short.ids == chat("chatml").prompt(turns("Hello")) and not short.cut


def test_long_prompts_are_left_out():
    e = encoder("chatml", max_prompt_tokens=24, long_prompts="drop")
    assert e.prompt(LONG) is None and e.prompt(turns("Hello")).messages == turns("Hello")


def test_long_prompts_are_an_error():
    e = encoder("chatml", max_prompt_tokens=24, long_prompts="error")
    with pytest.raises(InputError, match=r"the prompt 'Name a colour\..*has \d+ tokens, text.max_prompt_tokens is 24"):
        e.prompt(LONG)


def test_answers_end_with_the_stop_token_unless_cut():
    e = encoder("chatml", max_response_tokens=8)
    stop = chat("chatml").stop_ids[0]
    short, long = e.answer("Blue"), e.answer("Blue, of course! " * 9)
    assert short.ids[-1] == stop and stop not in short.ids[:-1] and stop not in short.quote
    assert len(long.ids) == 8 and stop not in long.ids and stop not in long.quote
    ids = (*chat("chatml").encode_text("Blue"), stop)
    assert e.sampled(ids).ids == ids and e.sampled(ids[:-1]).ids == ids[:-1], "sampled ids are kept"
    odd = (65, 66, 67, 255, 300, 301)  # not what the tokenizer would make of their text
    assert e.sampled(odd).ids == odd


def test_quoted_answers_are_cut_alike():
    j = judge("chatml", "standalone")
    e = encoder(
        "chatml", "standalone", max_prompt_tokens=32, max_response_tokens=64, context=j.fixed_tokens + 12 + 2 * 20 + 1
    )
    prompt = e.prompt(turns("Hello"))
    a, b = (e.sampled(chat("chatml").encode_text(w * 60)) for w in ("a", "b "))
    quote = e.quote_tokens(j, len(prompt.ids), len(prompt.quote))
    assert 1 < quote < 64
    for first, second in ((a, b), (b, a)):
        row = e.judge_row(j, prompt, first, second)
        assert len(row.ids) + 1 <= e.context
        expected = judge_row_of(j, prompt, first.quote[:quote], second.quote[:quote])
        assert row.ids == expected
    short = e.sampled(chat("chatml").encode_text("a"))
    assert e.judge_row(j, prompt, short, b).ids == judge_row_of(j, prompt, short.quote, b.quote[:quote])


def judge_row_of(j, prompt, a_text, b_text):
    return j.row(conversation=prompt.ids, prompt=prompt.quote, a=(), b=(), a_text=a_text, b_text=b_text)


def test_context_too_small():
    prompt = turns("Hello")
    e = encoder("chatml", context=24, max_response_tokens=16)
    with pytest.raises(InputError, match="exceed the model's context of 24; lower text.max_prompt_tokens"):
        e.lengths([e.prompt(prompt)])
    for layout in ("standalone", "continuation"):
        e = encoder("chatml", layout, context=64, max_response_tokens=16)
        p = e.prompt(prompt)
        with pytest.raises(InputError, match="leaves no room for the answers in the model's context of 64"):
            e.lengths([p])
        with pytest.raises(InputError, match="leaves no room"):
            e.judge_row(e.judges[0], p, e.answer("a"), e.answer("b"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_fit_the_static_lengths(name):
    e = encoder(name, "continuation", "standalone", max_prompt_tokens=40, max_response_tokens=10)
    prompts = (turns("a"), turns("abc " * 40))
    pairs = [e.pair(Comparison(messages, a, "b", None)) for messages in prompts for a in ("a", "ab " * 30)]
    lengths = e.lengths([pair.prompt for pair in pairs], {"ift": 13, "eft": 0})
    assert lengths.answer == 10 and lengths.targets == {"ift": 16, "eft": 0}
    for pair in pairs:
        assert len(pair.prompt.ids) <= lengths.prompt
        assert all(len(row.ids) <= lengths.scored for row in e.answer_rows(pair))
        for j, length in zip(e.judges, lengths.judges, strict=True):
            assert all(len(row.ids) <= length for row in e.judge_rows(j, pair))


# --- supervised rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_conversation_rows_mark_the_assistants_tokens(name):
    contents = (
        ("copy abc=", "abc", "reverse abc=", "cba!")
        if name == "world"
        else ("Hello", "Blue, of course!", "And you?", "I am\n\nfine")
    )
    messages = turns(*contents)
    c = chat(name)
    ((ids, marks, _),) = encoder(name).conversation_rows(messages)
    whole = reference(name, messages, False)
    assert list(ids) == whole[: len(ids)] and not control(name, whole[len(ids) :])
    first = len(c.prompt(messages[:1]))
    second = len(c.prompt(messages[:3]))
    a, b = (len(c.answer(text)) for text in contents[1::2])
    marked = {*range(first, first + a), *range(second, second + b)}
    assert {i for i, mark in enumerate(marks) if mark} == marked and len(marks) == len(ids) == second + b
    assert ids[first + a - 1] == ids[-1] == c.stop_ids[0]


def test_a_last_turn_without_an_answer_is_left_out():
    messages = turns("Hello", "Blue", "And you?", "fine")
    e = encoder("chatml")
    # What the user says last is nobody's prompt.
    assert e.conversation_rows([*messages, *turns("bye")]) == e.conversation_rows(messages)


@pytest.mark.parametrize("layout", ["standalone", "continuation"])
def test_verdict_rows(layout):
    e, j = encoder("chatml", layout, max_response_tokens=16), judge("chatml", layout)
    for label, better in ((1.0, 0), (0.0, 1)):
        comparison = Comparison(turns("Name a colour."), "Blue", "fine", label)
        (first, first_marks, _), (swapped, swapped_marks, _) = e.verdict_rows(j, e.pair(comparison))
        assert first[-1] == j.verdict_ids[better] and swapped[-1] == j.verdict_ids[1 - better]
        for ids, marks in ((first, first_marks), (swapped, swapped_marks)):
            assert len(ids) == len(marks) and sum(marks) == 1 and marks[-1]
        prompt = e.prompt(comparison.messages)
        assert first[:-1] == e.judge_row(j, prompt, e.answer("Blue"), e.answer("fine")).ids
        assert swapped[:-1] == e.judge_row(j, prompt, e.answer("fine"), e.answer("Blue")).ids
    assert e.verdict_rows(j, e.pair(Comparison(turns("x"), "a", "b", 0.5))) == []
    assert e.verdict_rows(j, e.pair(Comparison(turns("x"), "a", "b", None))) == []
