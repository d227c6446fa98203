"""The token budget: what is cut where, and what a cut leaves."""

import pytest
from tests.chat_templates import turns
from tests.data.small_data import CHAT, make_encoder

from scir_jax.data.encode import middle_cut, round_up


def test_round_up():
    assert [round_up(n) for n in (1, 8, 9, 256, 257, 384, 385)] == [8, 8, 16, 256, 384, 384, 512]


def test_middle_cut_keeps_the_end():
    ids = tuple(range(10))
    assert middle_cut(ids, 6, 5) == (0, 5, 6, 7, 8, 9) and middle_cut(ids, 6, 2) == (0, 1, 2, 7, 8, 9)
    assert middle_cut(ids, 3, 5) == (7, 8, 9) and middle_cut(ids, 1) == (9,) and middle_cut(ids, 10, 20) == ids


@pytest.mark.parametrize("limit", [5, 6, 7, 12])
def test_a_cut_prompt_keeps_the_assistants_header(limit):
    encoder = make_encoder(max_prompt_tokens=limit)
    prompt = encoder.prompt(turns("copy abcdefghijklmnop="))
    user, assistant = CHAT.tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert len(prompt.ids) == limit and prompt.cut and prompt.tokens == 22
    assert prompt.ids[1] == user and prompt.ids[-1] == assistant
    assert prompt.ids[-2] == CHAT.encode_text("=")[0]
    assert not encoder.prompt(turns("a")).cut


def test_both_answers_of_a_pair_are_cut_alike():
    encoder = make_encoder(max_prompt_tokens=100, max_response_tokens=60)
    conversation = encoder.prompt(turns(f"copy {'a' * 80}="))
    a, b = (encoder.answer(c * 100) for c in "bc")
    assert a.cut and b.cut and len(a.ids) == len(b.ids) == 60 and not set(a.ids + b.ids) & set(CHAT.stop_ids)
    for first, second in ((a, b), (b, a)):
        ids = encoder.judge_row(encoder.judges[0], conversation, first, second).ids
        counts = [ids.count(y.quote[0]) for y in (first, second)]
        assert counts[0] == counts[1] < 60 and len(ids) + 1 <= 256
