"""What rows mean: prompts, conversations, pairs of answers, and the sentences about bad ones."""

import json

import pytest

from scir_jax.config.schema import ColumnsConfig
from scir_jax.data import records
from scir_jax.data.messages import prompt_text
from scir_jax.errors import InputError


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


# --- prompts ----------------------------------------------------------------------------------------------------------

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


# --- conversations ----------------------------------------------------------------------------------------------------


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


# --- comparisons ------------------------------------------------------------------------------------------------------

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
