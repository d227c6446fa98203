"""A thousand rows that were changed at random: each is read, or refused with its file and line."""

import copy
import json
import random

import pytest

from scir_jax.data import records
from scir_jax.errors import InputError

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3 + 3?"},
]
ANSWER = {"role": "assistant", "content": "6"}
ROWS = {
    records.read_prompts: [{"prompt": "q"}, {"prompt": MESSAGES}, {"instruction": "sum up", "input": "a text"}],
    records.read_conversations: [{"messages": [*MESSAGES, ANSWER]}, {"prompt": "q", "response": "a"}],
    records.read_comparisons: [
        {"prompt": MESSAGES, "response_a": "6", "response_b": "7", "label": 1.0},
        {"chosen": [*MESSAGES, ANSWER], "rejected": [*MESSAGES, {"role": "assistant", "content": "7"}]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
    records.read_choices: [{"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]}],
}
VALUES = (
    None, True, 0, -1, 10**400, 1e308, "", " ", "\x00", "\ud800", "\u202e", "x" * 100_000, [], {}, [[]], [None], ["q"],
    {"role": "user"}, {"role": "tool", "content": "q"}, {"content": 1, "role": []}, [{"role": "user", "content": ["q"]}],
)  # fmt: skip
BYTES = (
    b"",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\\",
    b'"',
    b"}",
    b"[" * 100_000,
    b"NaN",
    b"\r",
    b"1e999",
    b"\xed\xa0\x80",
)


def places(value, path=()):
    """The paths of all that a JSON value holds."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(row: dict, chance: random.Random) -> bytes:
    """One row as a line, with a value or some bytes of it changed."""
    row = copy.deepcopy(row)
    if chance.random() < 0.6:
        *above, last = chance.choice([path for path in places(row) if path])
        inner = row
        for key in above:
            inner = inner[key]
        how = chance.choice(("replace", "delete", "rename"))
        if how == "replace":
            inner[last] = chance.choice(VALUES)
        else:
            value = inner.pop(last)
            if how == "rename" and isinstance(inner, dict):
                inner[chance.choice(("prompt", "chosen", "messages", "label", "tools", "", "Prompt"))] = value
        return json.dumps(row).encode()
    line, some = json.dumps(row).encode(), chance.choice(BYTES)
    start = chance.randrange(len(line))
    return line[:start] + some + line[chance.randrange(start, len(line) + 1) :]


@pytest.mark.parametrize("read", ROWS, ids=lambda read: read.__name__)
def test_it_is_read_or_refused_with_its_line(read, tmp_path):
    chance, file = random.Random(read.__name__), tmp_path / "rows.jsonl"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(250):
        good = chance.choice(ROWS[read])
        line = changed(chance.choice(ROWS[read]), chance)
        file.write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
        try:
            found = read(file)
        except InputError as error:
            message = str(error)
            assert message.startswith(f"{file}:2: ") and "\n" not in message and len(message) < 500, (line, message)
            message.encode()  # it can be printed
            outcomes["refused"] += 1
        else:
            assert len(found) == 1 + bool(line.strip()), line
            outcomes["read"] += 1
    assert min(outcomes.values()) > 9, outcomes
