"""Conversations to token ids, on small tokenizers of the three common kinds."""

import random
import unicodedata

import pytest
from tokenizers import AddedToken, normalizers

from scir_jax.errors import InputError
from scir_jax.text.chat import Chat, load_tokenizer
from tests.chat_templates import turns
from tests.text.common import CHATML, TOKENIZERS, byte_level, chat, control, conversations, hostile, reference, spelled


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_equal_the_chat_template_of_transformers(name, generation_prompt):
    for messages in conversations(name):
        ids = chat(name).flatten(chat(name).pieces(messages, generation_prompt=generation_prompt))
        assert list(ids) == reference(name, messages, generation_prompt), messages


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_answer_are_the_chat_template_up_to_the_stop_token(name):
    text = "abc" if name == "world" else "I am fine.\n\n  And you?"
    for messages in conversations(name):
        if messages[-1]["role"] == "user":
            ids = [*chat(name).prompt(messages), *chat(name).answer(text)]
            whole = reference(name, [*messages, {"role": "assistant", "content": text}], False)
            assert ids == whole[: len(ids)]
            assert not control(name, whole[len(ids) :])


@pytest.mark.parametrize("name", ["mistral", "mistral-always", "mistral-legacy", "world"])
def test_the_beginning_of_sequence_token_is_there_once(name):
    bos = chat(name).tokenizer.bos_token_id
    for messages in conversations(name):
        prompt = chat(name).prompt(messages) if messages[-1]["role"] == "user" else reference(name, messages, False)
        assert list(prompt).count(bos) == 1 and prompt[0] == bos
    assert bos not in chat(name).answer("abc") and bos not in chat(name).encode_text("abc")


def test_white_space_that_the_template_puts_around_an_answer_belongs_to_the_answer():
    tokens = {name: chat(name).tokenizer.convert_ids_to_tokens(chat(name).answer("Hello")) for name in TOKENIZERS}
    assert tokens["mistral"] == tokens["mistral-always"] == tokens["mistral-legacy"] == ["▁Hello", "</s>"]
    assert tokens["llama"] == tokens["llama-legacy"] == ["▁Hello", "▁", "</s>"]
    assert tokens["chatml"][-1] == "<|im_end|>" and tokens["chatml"][0].startswith("H")
    assert not tokens["sentencepiece-chatml"][0].startswith("▁")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_given_as_content_stay_as_they_are(name):
    sampled = tuple(range(20, 30))
    stop = chat(name).stop_ids[0]
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": [sampled]}]
    ids = chat(name).flatten(chat(name).pieces(messages, generation_prompt=False))
    prompt = chat(name).prompt(messages[:1])
    assert ids[: len(prompt) + 11] == (*prompt, *sampled, stop)


def test_stop_tokens():
    tokenizer = byte_level()
    tokenizer.eos_token = "<|endoftext|>"
    end, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    # A turn ends with what the template writes, although no configuration names it.
    assert Chat(tokenizer, "x").stop_ids == (turn, end)
    assert Chat(tokenizer, "x", [end, turn]).stop_ids == (turn, end)
    assert Chat(tokenizer, "x").pad_id == end


def test_decode_leaves_out_the_stop_token_alone():
    c = chat("chatml")
    ids = c.encode_text("Hello there")
    assert c.decode(ids) == c.decode((*ids, c.stop_ids[0])) == "Hello there"
    assert c.decode((*ids, c.stop_ids[0], c.stop_ids[0])) == "Hello there<|im_end|>"
    assert c.decode(()) == c.decode(c.stop_ids[:1]) == ""


def test_white_space_tokens_are_text():
    c = chat("chatml")
    double = c.tokenizer.convert_tokens_to_ids("\n\n")
    assert double in c.encode_text("A\n\nB") and double not in c.control_ids


@pytest.mark.parametrize("both_sides", [True, False])
def test_control_tokens_that_take_the_white_space_beside_them(both_sides):
    tokenizer = byte_level(CHATML.replace("<|im_end|>\n", " <|end|>\n  "))
    end = AddedToken("<|end|>", special=True, normalized=False, rstrip=True, lstrip=both_sides)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    c = Chat(tokenizer, "x")
    messages = turns("Hello", "there", "how")
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert list(c.prompt(messages)) == expected


# --- text is never control --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_never_becomes_control(name):
    c = chat(name)
    texts = list(hostile(name))
    assert len(texts) > 80
    clean_user = control(name, c.prompt(turns("a")))
    clean_turns = control(name, c.prompt(turns("a", "a", "a")))
    for text in texts:
        ids = c.encode_text(text)
        assert not control(name, ids), text
        assert control(name, c.answer(text)) == [c.stop_ids[0]], text
        assert control(name, c.prompt(turns(text))) == clean_user, text
        assert control(name, c.prompt(turns("a", text, text))) == clean_turns, text
        if name != "world":
            assert spelled(name, ids) == text
            assert text in spelled(name, c.prompt(turns(text)))


def test_control_tokens_that_share_characters():
    """A spelling may begin inside another, and what remains of a broken one may complete the next."""
    tokenizer = byte_level()
    tokens = ["<a><b>", "<b><a>", "<a>", "<<a>", "aba", "bab"]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    c = Chat(tokenizer, "x")
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("<>ab") for _ in range(rng.randrange(1, 16)))
        ids = c.encode_text(text)
        assert c.control_ids.isdisjoint(ids) and tokenizer.decode(ids) == text


def test_a_normaliser_cannot_make_control_tokens():
    tokenizer = byte_level(normalizer=normalizers.NFKC())
    c = Chat(tokenizer, "x")
    wide = "＜｜ｉｍ＿ｅｎｄ｜＞"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in tokenizer(wide)["input_ids"], "the tokenizer itself is fooled"
    for text in (
        wide,
        f"A {wide}B",
        wide * 5,
        "<|im" + wide[4:],
        f"<|im_{wide}end|>",
        wide[:4] + "<|im_end|>" + wide[4:],
    ):
        ids = c.encode_text(text)
        assert c.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFKC", text)
        assert control("chatml", c.answer(text)) == [end]


def test_a_character_that_is_a_control_token_is_refused():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("§", special=True, normalized=False)])
    with pytest.raises(InputError, match="the character '§'"):
        Chat(tokenizer, "x").encode_text("A § B")


def test_very_many_control_tokens():
    text = "<|im_end|>" * 3000
    ids = chat("chatml").encode_text(text)
    assert not control("chatml", ids) and spelled("chatml", ids) == text


# --- tokenizers that do not serve -------------------------------------------------------------------------------------


def test_tokenizer_without_a_chat_template():
    with pytest.raises(InputError, match="some/where: the tokenizer has no chat template; add chat_template.jinja"):
        Chat(byte_level(None), "some/where")


def test_tokenizer_without_a_stop_token():
    tokenizer = byte_level(
        "{{ messages[0]['content'] }}{% if messages|length > 1 %}{{ messages[1]['content'] }}{% endif %}"
    )
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="names an end-of-sequence token"):
        Chat(tokenizer, "x")


def test_chat_template_that_forbids_a_role():
    forbids = CHATML.replace(
        "{{-",
        "{%- if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{-",
        1,
    )
    c = Chat(byte_level(forbids), "x")
    with pytest.raises(InputError, match=r"refuses a conversation of \(system, user\): System role not supported"):
        c.prompt(turns("Hello", system="You"))
    with pytest.raises(InputError, match="roles must alternate"):
        chat("mistral").prompt([*turns("a"), *turns("b")])


def test_chat_template_that_leaves_out_a_message():
    silent = CHATML.replace("{{-", "{%- if message['role'] != 'system' %}{{-", 1).replace(
        "\n' }}\n", "\n' }}{% endif %}\n", 1
    )
    with pytest.raises(InputError, match="leaves out the content of message 0"):
        Chat(byte_level(silent), "x").prompt(turns("Hello", system="You"))


def test_load_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="the tokenizer does not load"):
        load_tokenizer(tmp_path)
    byte_level().save_pretrained(tmp_path)
    c = Chat(load_tokenizer(tmp_path), str(tmp_path))
    assert c.prompt(turns("Hello")) == chat("chatml").prompt(turns("Hello"))
