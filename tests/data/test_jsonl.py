"""JSONL files: rows with their places, files that are none, and writing whole or not at all."""

import errno
import json

import pytest

from scir_jax.data import jsonl
from scir_jax.data.files import read_rows
from scir_jax.errors import InputError


def refused(path):
    with pytest.raises(InputError) as error:
        read_rows(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message.removeprefix(str(path))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_missing_file_and_directory(tmp_path):
    assert refused(tmp_path / "no.jsonl") == ": no such file"
    assert refused(tmp_path) == ": is a directory, expected a JSONL file"


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
    assert refused(path).startswith(message)


def test_rows_and_their_places(tmp_path):
    path = tmp_path / "rows.jsonl"
    # Other separators of lines than the newline may stand inside a text.
    texts = ["a", "b\u2028c\x85d", "ü🙂\t\\n"]
    lines = [json.dumps({"prompt": t}, ensure_ascii=False) for t in texts]
    path.write_bytes("\n\n".join(lines).encode() + b"\r\n")
    assert read_rows(path) == [(f"{path}:{2 * i + 1}", {"prompt": t}) for i, t in enumerate(texts)]


# --- writing ----------------------------------------------------------------------------------------------------------


def test_written_rows_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "ü🙂\u2028\n\r"}, {"text": "lone \ud800"}, {"ids": [1, 2]}]
    jsonl.write_rows(path, iter(rows))
    assert [row for _, row in read_rows(path)] == rows
    assert "🙂" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path, stop):
    path = tmp_path / "rows.jsonl"
    jsonl.write_rows(path, [{"old": 1}])

    def rows():
        yield from ({"new": i} for i in range(10_000))
        raise stop

    with pytest.raises(stop):
        jsonl.write_rows(path, rows())
    assert path.read_bytes() == b'{"old": 1}\n' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        jsonl.write_rows(path, [{"new": 1}, {"new": object()}])
    with pytest.raises(TypeError):
        jsonl.write_json(path, object())
    assert path.read_bytes() == b'{"old": 1}\n' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "write_new", [lambda p: jsonl.write_rows(p, [{"new": 1}]), lambda p: jsonl.write_json(p, {"new": 1})]
)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write_new):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl.os, "fsync", full)
    with pytest.raises(OSError):
        write_new(path)
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_nothing_is_seen_before_all_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"

    def rows():
        for i in range(3):
            assert not path.exists()
            yield {"i": i}

    jsonl.write_rows(path, rows())
    assert len(read_rows(path)) == 3


def test_batched():
    assert list(jsonl.batched(range(5), 2)) == [range(2), range(2, 4), range(4, 5)]
