"""JSONL files of records, rows and the Grain pipelines."""

import errno
import itertools
import json

import numpy as np
import pytest

from scir_jax.config.schema import ColumnsConfig, Config, TextConfig
from scir_jax.data import files, records
from scir_jax.data.encode import Encoder
from scir_jax.data.messages import prompt_text
from scir_jax.data.pipelines import iterator, pairs_dataset, sft_dataset, targets_dataset
from scir_jax.data.batches import Row, pad, pad_rows, round_up, taken
from scir_jax.errors import InputError
from scir_jax.text.chat import Chat
from scir_jax.text.judge import Template, compile_judge
from scir_jax.world.tokenizer import build_tokenizer


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(read, path, **arguments):
    with pytest.raises(InputError) as error:
        read(path, **arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message.removeprefix(str(path))


# --- files --------------------------------------------------------------------------------------------------------------


def test_missing_file_and_directory(tmp_path):
    assert refused(files.read_rows, tmp_path / "no.jsonl") == ": no such file"
    assert refused(files.read_rows, tmp_path) == ": is a directory, expected a JSONL file"


GOOD = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", ": the file has no rows"),
        (b"\n \n\r\n", ": the file has no rows"),
        (GOOD + b"{'prompt': 1}\n", ":2: broken JSON at column 2: Expecting property name enclosed in double quotes"),
        (GOOD + b"\n" + b"{]\n", ":3: broken JSON at column 2: "),
        (GOOD + b'{"prompt": "half', ":2: broken JSON at column 12: Unterminated string starting at"),
        (GOOD + b'{"prompt": "half"', ":2: broken JSON at column 18: Expecting ',' delimiter"),
        (GOOD + b'{"prompt": "a"} {"prompt": "b"}\n', ":2: broken JSON at column 17: Extra data"),
        (GOOD + b'{"prompt": "caf\xe9"}\n', ":2: not UTF-8 (byte 16 of the line); convert the file"),
        (GOOD + b'{"prompt": "\xff"}', ":2: not UTF-8 (byte 13 of the line); convert the file"),
        (b"\xef\xbb\xbf" + GOOD, ":1: starts with a byte-order mark; save the file as UTF-8 without BOM"),
        (GOOD.decode().encode("utf-16"), ":1: starts with a byte-order mark; save the file as UTF-8 without BOM"),
        ("\ufeff{}".encode("utf-16-be"), ":1: starts with a byte-order mark; save the file as UTF-8 without BOM"),
        ("\ufeff{}".encode("utf-32-le"), ":1: starts with a byte-order mark; save the file as UTF-8 without BOM"),
        (GOOD.decode().encode("utf-16-le"), ":1: broken JSON at column 2: "),
        (GOOD + b'{"x": NaN}\n', ":2: broken JSON: NaN is not JSON"),
        (GOOD + b'{"x": [1, -Infinity]}\n', ":2: broken JSON: -Infinity is not JSON"),
        (GOOD + b"[1]\n", ":2: expected a JSON object, found list"),
        (GOOD + b"null\n", ":2: expected a JSON object, found NoneType"),
        (GOOD + b'"text"\n', ":2: expected a JSON object, found str"),
        (GOOD + b"\x00\n", ":2: broken JSON at column 1: "),
        (GOOD + b"[" * 200_000 + b"\n", ":2: JSON nested too deeply"),
        (GOOD + b'{"a":' * 200_000 + b"\n", ":2: JSON nested too deeply"),
        (GOOD + b'{"x": ' + b"1" * 10_000 + b"}\n", ":2: broken JSON: "),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:30],
)
def test_files_that_are_no_jsonl(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert refused(files.read_rows, path).startswith(message)


def test_rows_and_their_places(tmp_path):
    path = tmp_path / "rows.jsonl"
    # Other separators of lines than the newline may stand inside a text.
    texts = ["a", "b\u2028c\x85d", "ü🙂\t\\n"]
    lines = [json.dumps({"prompt": t}, ensure_ascii=False) for t in texts]
    path.write_bytes("\n\n".join(lines).encode() + b"\r\n")
    assert files.read_rows(path) == [(f"{path}:{2 * i + 1}", {"prompt": t}) for i, t in enumerate(texts)]


# --- prompts ------------------------------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def test_prompts(tmp_path):
    path = write(
        tmp_path, {"prompt": "q"}, {"prompt": [SYSTEM, USER]}, {"prompt": [{**USER, "name": "x"}, ASSISTANT, USER]}
    )
    prompts = [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER]]
    assert records.read_prompts(path) == [(f"{path}:{i + 1}", prompt) for i, prompt in enumerate(prompts)]
    assert prompt_text([USER]) == "q"
    assert prompt_text([SYSTEM, USER]) == "system: s\n\nuser: q"


BAD_CONTENT = ": expected an object with the texts 'role' and 'content'"


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, ":2: lacks the key 'prompt'; has none"),
        ({"Prompt": "q", "id": 1}, ":2: lacks the key 'prompt'; has 'Prompt', 'id'"),
        ({"prompt": ""}, ":2: prompt: is empty"),
        ({"prompt": " \n\t"}, ":2: prompt: is empty"),
        ({"prompt": 7}, ":2: prompt: expected a text or a list of messages, found int"),
        ({"prompt": None}, ":2: prompt: expected a text or a list of messages, found NoneType"),
        ({"prompt": {"role": "user", "content": "q"}}, ":2: prompt: expected a text or a list of messages, found dict"),
        ({"prompt": []}, ":2: prompt: expected a text or a list of messages, found an empty list"),
        ({"prompt": ["q"]}, ":2: prompt[0]" + BAD_CONTENT),
        ({"prompt": [USER, {"role": "user"}]}, ":2: prompt[1]" + BAD_CONTENT),
        ({"prompt": [{"role": "user", "content": None}]}, ":2: prompt[0]" + BAD_CONTENT),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
            ":2: prompt[0]: content is a list of parts; only text is supported, give it as one string",
        ),
        ({"prompt": [{"content": "q"}]}, ":2: prompt[0]: role must be one of system, user, assistant, not None"),
        (
            {"prompt": [{"role": "human", "content": "q"}]},
            ":2: prompt[0]: role must be one of system, user, assistant, not 'human'",
        ),
        (
            {"prompt": [{"role": ["user"], "content": "q"}]},
            ":2: prompt[0]: role must be one of system, user, assistant, not ['user']",
        ),
        ({"prompt": [USER, ASSISTANT]}, ":2: prompt: must end with a user's message, ends with assistant's"),
        ({"prompt": [SYSTEM]}, ":2: prompt: must end with a user's message, ends with system's"),
        ({"prompt": [USER, SYSTEM, USER]}, ":2: prompt[1]: a system message may only come first"),
        ({"prompt": [USER, USER]}, ":2: prompt[1]: roles must alternate: user follows user"),
        ({"prompt": [ASSISTANT, USER]}, ":2: prompt[0]: the first turn must be a user's"),
        ({"prompt": [{"role": "user", "content": " "}]}, ":2: prompt: is empty"),
        ({"prompt": "a\ud800b"}, ":2: prompt: holds a lone surrogate or a private-use character; clean the text"),
        (
            {"prompt": "a\ue0001\ue001b"},
            ":2: prompt: holds a lone surrogate or a private-use character; clean the text",
        ),
        ({"prompt": [{"role": "user", "content": "\udfff"}]}, ":2: prompt[0].content: holds a lone surrogate"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_bad_prompts(tmp_path, row, message):
    assert refused(records.read_prompts, write(tmp_path, {"prompt": "q"}, row)).startswith(message)


# --- conversations ------------------------------------------------------------------------------------------------------


def test_conversations(tmp_path):
    path = write(
        tmp_path,
        {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT, USER]},
        {"prompt": "q", "response": "a"},
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
        {"prompt": "q", "completion": ""},
    )
    assert [messages for _, messages in records.read_conversations(path)] == [
        [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
        [USER, ASSISTANT, USER],
        [USER, ASSISTANT],
        [SYSTEM, USER, ASSISTANT],
        [USER, {"role": "assistant", "content": ""}],
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"text": "x"},
            ":1: lacks the key 'messages' (or 'conversations'); has 'text'; a plain text has no turns: convert it",
        ),
        ({"prompt": "q"}, ":1: lacks the key 'response' (or 'completion'); has 'prompt'"),
        ({"prompt": "q", "response": 3}, ":1: response: expected a text or a list of messages, found int"),
        ({"prompt": "q", "completion": [USER]}, ":1: completion: expected a text or one assistant's message"),
        (
            {"prompt": "q", "completion": [ASSISTANT, USER]},
            ":1: completion: expected a text or one assistant's message",
        ),
        ({"messages": "q"}, ":1: messages: expected a text or a list of messages, found str"),
        ({"messages": [USER]}, ":1: the conversation has no assistant's turn to learn from"),
        ({"messages": [ASSISTANT]}, ":1: messages[0]: the first turn must be a user's"),
        (
            {"messages": [USER, ASSISTANT, ASSISTANT]},
            ":1: messages[2]: roles must alternate: assistant follows assistant",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "\ud83d"}]},
            ":1: messages[1].content: holds a lone surrogate",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_bad_conversations(tmp_path, row, message):
    assert refused(records.read_conversations, write(tmp_path, row)).startswith(message)


# --- comparisons --------------------------------------------------------------------------------------------------------

BETTER, WORSE = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": "q", "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"prompt": "q", "response_a": "good", "response_b": "bad", "label": 1},
    ],
    ids=["plain", "conversational", "whole conversations", "implicit prompt", "labelled"],
)
def test_comparison_formats(tmp_path, row):
    path = write(tmp_path, row)
    assert records.read_comparisons(path, need_label=True) == [
        records.Comparison([USER], "good", "bad", 1.0, f"{path}:1")
    ]


def test_labels(tmp_path):
    pair = {"prompt": "q", "response_a": "x", "response_b": "y"}
    path = write(tmp_path, pair, {**pair, "label": None}, {**pair, "label": 0}, {**pair, "label": 0.25})
    assert [c.label for c in records.read_comparisons(path)] == [None, None, 0.0, 0.25]
    path = write(tmp_path, {**pair, "label": 0, "teacher": 1}, pair)
    columns = ColumnsConfig(label="teacher")
    assert records.read_comparisons(path, columns)[0].label == 1.0
    message = refused(records.read_comparisons, path, columns=columns, need_label=True)
    assert message == ":2: lacks the label 'teacher': 1 where response_a is better, 0 where response_b is"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "q"}, ":1: lacks the key 'chosen'; has 'prompt'"),
        ({"prompt": "q", "chosen": "a"}, ":1: lacks the key 'rejected'"),
        (
            {"chosen": "a", "rejected": "b"},
            ":1: lacks the key 'prompt'; has 'chosen', 'rejected'; it may be left out where chosen",
        ),
        ({"response_a": "a", "response_b": "b"}, ":1: lacks the key 'prompt'"),
        ({"prompt": "q", "response_a": "a"}, ":1: lacks the key 'response_b'"),
        ({"prompt": "q", "response_a": "a", "response_b": 1}, ":1: response_b: expected a text or a list"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, ":1: rejected: expected a text or a list"),
        (
            {"prompt": "q", "chosen": [BETTER], "rejected": [USER]},
            ":1: rejected: expected a text or one assistant's message",
        ),
        (
            {"prompt": "z", "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
            ":1: chosen does not begin with the prompt",
        ),
        (
            {"chosen": [USER, BETTER], "rejected": [SYSTEM, USER, WORSE]},
            ":1: chosen and rejected must share all messages but the last",
        ),
        ({"chosen": [BETTER], "rejected": [WORSE]}, ":1: chosen and rejected must share all messages but the last"),
        (
            {"chosen": [USER, BETTER], "rejected": [USER, USER]},
            ":1: rejected: expected a text or one assistant's message",
        ),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "label": 2},
            ":1: label: must be a number from 0 to 1, not 2",
        ),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "label": True},
            ":1: label: must be a number from 0 to 1, not True",
        ),
        (
            {"prompt": "q", "response_a": "a", "response_b": "b", "label": "a"},
            ":1: label: must be a number from 0 to 1, not 'a'",
        ),
        ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, ":1: chosen: holds a lone surrogate"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_bad_comparisons(tmp_path, row, message):
    assert refused(records.read_comparisons, write(tmp_path, row)).startswith(message)


# --- writing ------------------------------------------------------------------------------------------------------------


def test_written_rows_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "ü🙂\u2028\n\r"}, {"text": "lone \ud800"}, {"ids": [1, 2]}]
    records.write_rows(path, iter(rows))
    assert [row for _, row in files.read_rows(path)] == rows
    assert "🙂" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path, stop):
    path = tmp_path / "rows.jsonl"
    records.write_rows(path, [{"old": 1}])

    def rows():
        yield from ({"new": i} for i in range(10_000))
        raise stop

    with pytest.raises(stop):
        records.write_rows(path, rows())
    assert path.read_bytes() == b'{"old": 1}\n' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        records.write_rows(path, [{"new": 1}, {"new": object()}])
    with pytest.raises(TypeError):
        records.write_json(path, object())
    assert path.read_bytes() == b'{"old": 1}\n' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "write_new", [lambda p: records.write_rows(p, [{"new": 1}]), lambda p: records.write_json(p, {"new": 1})]
)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write_new):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError):
        write_new(path)
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_nothing_is_seen_before_all_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"

    def rows():
        for i in range(3):
            assert not path.exists()
            yield {"i": i}

    records.write_rows(path, rows())
    assert len(files.read_rows(path)) == 3


def test_batched():
    assert list(records.batched(range(5), 2)) == [range(2), range(2, 4), range(4, 5)]


# --- rows ---------------------------------------------------------------------------------------------------------------


def test_padding():
    rows = pad_rows([Row((5, 6, 7), 1, 2), Row((0, 0), judged=True), Row((), 0, 0)], 4, pad_id=9)
    assert rows.ids.tolist() == [[5, 6, 7, 9], [0, 0, 9, 9], [9, 9, 9, 9]]
    assert rows.start.tolist() == [1, 0, 0] and rows.length.tolist() == [2, 0, 0]
    assert rows.verdict.tolist() == [0, 1, 0]
    assert all(part.dtype == np.int32 for part in rows)
    assert pad((1, 2), 2, 0).tolist() == [1, 2]
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit into 2"):
        pad((1, 2, 3), 2, 0)
    with pytest.raises(ValueError, match="does not fit"):
        pad_rows([Row((1,)), Row((1, 2, 3))], 2, 0)


def test_round_up():
    assert [round_up(n) for n in (1, 8, 9, 256, 257, 384, 385)] == [8, 8, 16, 256, 384, 384, 512]


def test_taken():
    assert taken("abc", np.array([0, 2])) == ["a", "c"]
    assert taken("ab", np.arange(4)) == ["a", "b", "a", "a"]


# --- pipelines ----------------------------------------------------------------------------------------------------------

WORDS = ["".join(letters) for letters in itertools.islice(itertools.product("abcdefghij", repeat=3), 0, 1000, 90)]
CHAT = Chat(build_tokenizer(256), "world")
JUDGES = {
    "standalone": Template("s", "standalone", "judge {prompt}{response_a};{prompt}{response_b}", "", ("1", "2")),
    "continuation": Template("c", "continuation", "judge {prompt}{response_b}", "", ("1", "2")),
}


def make_encoder(*layouts):
    config = Config(text=TextConfig(max_prompt_tokens=24, max_response_tokens=8))
    return Encoder(config, CHAT, [compile_judge(JUDGES[layout], CHAT) for layout in layouts or ("standalone",)], 256)


def pair_rows(**more):
    return [
        (
            f"pairs.jsonl:{i + 1}",
            {
                "messages": [{"role": "user", "content": f"copy {word}="}],
                "response_a_ids": CHAT.answer(word),
                "response_b_ids": CHAT.encode_text(word[::-1]),
                "preference_logps": [-1.0 - i, -2.0],
                "implicit_logps": [-1.0, -2.0 - i],
                "start_logps": [-3.0, -4.0],
                **more,
            },
        )
        for i, word in enumerate(WORDS)
    ]


def pairs(
    rows=None,
    encoder=None,
    *,
    batch_size=5,
    epochs=1,
    seed=0,
    need_label=None,
    rewards=2,
    ift=None,
    eft=None,
    share=np.arange,
):
    encoder = encoder or make_encoder()
    rows = pair_rows() if rows is None else rows
    prompts = [encoder.prompt(row["messages"]) for _, row in rows]
    return pairs_dataset(
        rows,
        encoder,
        encoder.shapes(prompts),
        rewards=rewards,
        need_label=need_label,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        ift=ift,
        eft=eft,
        share=share,
    )


def index(batch):
    return batch.pairs.index.tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 6, 12, 16])
def test_each_pair_once_an_epoch(batch_size):
    count = len(WORDS)
    assert count == 12
    dataset = pairs(batch_size=batch_size)
    assert len(dataset) == -(-count // batch_size)
    batches = list(iterator(dataset))
    assert all(len(b.pairs.index) == batch_size and len(b.pairs.responses.ids) == batch_size for b in batches)
    seen = [i for b in batches for i in index(b)]
    real = [i for i in seen if i >= 0]
    assert sorted(real) == list(range(count)) and real != sorted(real)
    assert seen[:count] == real, "only the end is filled up"
    weights = np.concatenate([b.pairs.weight for b in batches])
    assert weights.tolist() == [1.0] * count + [0.0] * (len(seen) - count)


def test_epochs_are_shuffled_anew():
    batches = list(iterator(pairs(batch_size=12, epochs=3)))
    orders = [index(b) for b in batches]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_each_pair_as_often_as_there_are_epochs():
    seen = [i for b in iterator(pairs(batch_size=5, epochs=2)) for i in index(b)]
    assert sorted(seen) == [-1] + sorted(list(range(12)) * 2), "24 pairs and one to fill"
    assert sorted(seen[:12]) == list(range(12)), "an epoch ends before the next begins"


def same(a, b):
    import jax

    jax.tree.map(np.testing.assert_array_equal, a, b)


def replay(seed, size=3, share=np.arange):
    rows = [((1, 2, i), (False, True, True)) for i in range(7)]
    return targets_dataset(rows, 4, size, pad_id=0, seed=seed, share=share)


# Of which rows of a batch a host holds which: thirds, every second one, some held by two hosts.
SHARES = {
    "parts": [lambda size, host=host: np.arange(size)[host * size // 3 : (host + 1) * size // 3] for host in range(3)],
    "alternating": [lambda size, host=host: np.arange(host, size, 2) for host in range(2)],
    "overlapping": [lambda size: np.arange(size)[: 2 * size // 3], lambda size: np.arange(size)[size // 3 :]],
}


@pytest.mark.parametrize("kind", SHARES)
def test_shares_of_hosts_make_the_batch(kind):
    """Every host makes those rows of the batches that it holds, fillers of the last one included."""
    import jax

    def dataset(share=np.arange):
        parts = dict(ift=replay(1, 6, share), eft=replay(2, 3, share))
        return pairs(batch_size=9, epochs=2, share=share, encoder=make_encoder("standalone", "continuation"), **parts)

    whole = dataset()
    assert len(whole) == 3
    assert whole[2].pairs.weight.tolist() == [1.0] * 6 + [0.0] * 3, "24 pairs and three to fill"
    for share in SHARES[kind]:
        own = dataset(share)
        assert len(own) == len(whole)
        for batch, (expected, found) in enumerate(zip(iterator(whole), iterator(own), strict=True)):
            same(found, jax.tree.map(lambda x: x[share(len(x))], expected))
            rows = share(9)
            assert [i < 0 for i in index(found)] == [batch == 2 and row >= 6 for row in rows]


def test_the_same_seed_gives_the_same_order():
    one, two, other = (list(iterator(pairs(epochs=2, seed=s, ift=replay(s), eft=replay(s + 1)))) for s in (3, 3, 4))
    same(one, two)
    assert [index(b) for b in one] != [index(b) for b in other]
    assert any((a.ift.ids != b.ift.ids).any() for a, b in zip(one, other))


@pytest.mark.parametrize("taken", [0, 1, 2, 4, 5])
def test_a_position_is_restored_exactly(taken):
    def dataset():
        return pairs(batch_size=5, epochs=2, ift=replay(0), eft=replay(1))

    whole = list(iterator(dataset()))
    assert len(whole) == 5
    first = iterator(dataset())
    head = [next(first) for _ in range(taken)]
    state = json.loads(json.dumps(first.get_state()))
    rest = list(iterator(dataset(), state))
    assert len(rest) == 5 - taken
    same(head + rest, whole)
    same(list(first), rest)


@pytest.mark.parametrize(
    "layouts", [("standalone",), ("continuation",), ("continuation", "standalone"), ("standalone", "continuation")]
)
def test_batches_hold_the_rows_of_their_pairs(layouts):
    encoder = make_encoder(*layouts)
    rows = pair_rows(frozen_logits=[0.5, -0.5], length_penalty=0.25, label=0.75)
    for batch in iterator(pairs(rows, encoder, batch_size=4)):
        p = batch.pairs
        assert batch.ift is None and batch.eft is None
        assert len(p.judges) == len(layouts) - (layouts[0] == "continuation")
        for at, i in enumerate(index(batch)):
            row = rows[i][1]
            a, b = (encoder.sampled(row[f"response_{side}_ids"]) for side in "ab")
            responses, judged = encoder.pair_rows(encoder.prompt(row["messages"]), a, b)
            for made, expected in zip((p.responses, *p.judges), (responses, *judged), strict=True):
                for side in range(2):
                    ids = expected[side].ids
                    assert tuple(made.ids[at, side, : len(ids)]) == ids
                    assert (made.ids[at, side, len(ids) :] == CHAT.pad_id).all()
                    assert (
                        made.start[at, side] == expected[side].start and made.length[at, side] == expected[side].length
                    )
                    assert made.verdict[at, side] == (len(ids) - 1 if expected[side].judged else 0)
            start = p.responses.start[at]
            for side, response in enumerate((a.ids, b.ids)):
                span = p.responses.ids[at, side, start[side] : start[side] + p.responses.length[at, side]]
                assert tuple(span) == tuple(response), "scored as sampled"
            assert p.preference_logps[at].tolist() == row["preference_logps"]
            assert p.implicit_logps[at].tolist() == row["implicit_logps"] and p.start_logps[at].tolist() == [-3.0, -4.0]
            assert p.length_penalty[at].tolist() == [0.25 * len(a.ids), 0.25 * len(b.ids)]
            assert p.frozen_logits[at].tolist() == [0.5, -0.5] and p.external[at] == 0.75


def test_pairs_without_labels_and_with_wrong_ones():
    assert next(iterator(pairs(batch_size=12))).pairs.external.tolist() == [0.5] * 12
    with pytest.raises(InputError, match="pairs.jsonl:1: lacks the external label 'teacher'"):
        pairs(need_label=("teacher",))
    assert set(next(iterator(pairs(pair_rows(teacher=1), need_label=("teacher",)))).pairs.external) == {1.0}
    with pytest.raises(InputError, match="pairs.jsonl:1: frozen_logits has 3 values for 2 reward models"):
        pairs(pair_rows(frozen_logits=[1, 2, 3]))


def test_supervised_batches():
    rows = [((1, 2, 3), (False, True, True)), ((4,), (True,))]
    dataset = targets_dataset(rows, 4, 2, pad_id=7, seed=0)
    for i in range(6):
        batch = dataset[i]
        order = np.argsort(batch.ids[:, 0])
        assert batch.ids[order].tolist() == [[1, 2, 3, 7], [4, 7, 7, 7]], "each row once a pass"
        assert batch.mask[order].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert targets_dataset([], 4, 2, 0, 0) is None and targets_dataset(rows, 4, 0, 0, 0) is None
    with pytest.raises(ValueError):
        targets_dataset(rows, 2, 2, 0, 0)[0]


def test_supervised_training():
    batches = list(iterator(sft_dataset(replay(0), None, 4)))
    assert len(batches) == 4 and all(b.pairs is None and b.eft is None and b.ift.ids.shape == (3, 4) for b in batches)
    whole = [row[2] for i in range(7) for row in replay(0)[i].ids.tolist()]
    assert sorted(whole[:7]) == sorted(whole[7:14]) == list(range(7)) and whole[:7] != whole[7:14]
