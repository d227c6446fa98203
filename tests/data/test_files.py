"""Files and directories of rows in every format, and data sets of the hub."""

import gzip
import hashlib
import json
import shutil
import sys
import types

import pytest

from scir_jax.data import files, sources
from scir_jax.data.records import read_prompts
from scir_jax.errors import InputError

ROWS = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "ü🙂"}], "id": 7, "score": 0.5, "tags": ["x", None]}]


def refused(source, message):
    with pytest.raises(InputError) as error:
        for _, row in sources.rows(source):
            if isinstance(row, InputError):
                raise row
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"{source}{message}"), text


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(source):
    return list(sources.rows(source))


@pytest.mark.parametrize(
    "name, content, places",
    [
        ("rows.jsonl", lines(), "{0}:{1}"),
        ("rows.ndjson", lines(), "{0}:{1}"),
        ("rows", lines(), "{0}:{1}"),
        ("rows.jsonl.gz", gzip.compress(lines(), mtime=0), "{0}:{1}"),
        ("rows.json", lines(), "{0}:{1}"),  # many .json files are JSON Lines
        ("rows.json", json.dumps(ROWS).encode(), "{0}:row {1}"),
        ("rows.JSON", json.dumps(ROWS, indent=2).encode(), "{0}:row {1}"),
        ("rows.json", json.dumps({"version": 1, "data": ROWS}, indent=2).encode(), "{0}:row {1}"),
        ("rows.json", json.dumps({"data": ROWS}).encode(), "{0}:row {1}"),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0), "{0}:row {1}"),
    ],
)
def test_json_formats(tmp_path, name, content, places):
    path = tmp_path / name
    path.write_bytes(content)
    assert read(path) == [(places.format(path, i + 1), row) for i, row in enumerate(ROWS)]
    assert sources.sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_json_file_of_one_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[0]))
    assert read(path) == [(f"{path}:row 1", ROWS[0])]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.json", b'[{"prompt": "a"}\n{"prompt": "b"}]', ": broken JSON in line 2 at column 1: "),
        ("rows.json", b'{\n "prompt": }', ": broken JSON in line 2 at column 12: "),
        ("rows.json", b"3", ": expected a list of JSON objects, found int"),
        ("rows.json", b'[{"prompt": "a"}, 3]', ":row 2: expected a JSON object, found int"),
        ("rows.json", b"\xef\xbb\xbf[]", ":1: starts with a byte-order mark"),
        ("rows.json", b'[{"prompt": NaN}]', ": broken JSON: NaN is not JSON"),
        ("rows.json", b'[{"a": 1, "a": 2}]', ": broken JSON: the key 'a' occurs twice"),
        ("rows.jsonl", b'{"a": 1}\n{"prompt": "x", "prompt": "y"}\n', ":2: broken JSON: the key 'prompt' occurs twice"),
        ("rows.jsonl", b'{"a": [{"b": 1, "c": 2, "b": 1}]}\n', ":1: broken JSON: the key 'b' occurs twice"),
        ("rows.jsonl.gz", lines(), ": not a readable gzip file: "),
        ("rows.jsonl.gz", gzip.compress(lines() * 100, mtime=0)[:-20], ": not a readable gzip file: "),
        ("rows.json.gz", gzip.compress(b"[]", mtime=0)[:-4], ": not a readable gzip file: "),
        ("rows.csv", b"prompt\na\n", ": .csv files are not read; convert it to JSON Lines (.jsonl) or .parquet"),
        ("rows.pkl", b"", ": .pkl files are not read"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:30],
)
def test_files_that_are_not_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, message)


def test_other_rows_of_a_file_are_read_beside_a_bad_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{broken\n[1]\n{"a": 2}\n')
    rows = read(path)
    assert [where for where, _ in rows] == [f"{path}:{i}" for i in (1, 2, 3, 4)]
    assert [isinstance(row, InputError) for _, row in rows] == [False, True, True, False]
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1}, 2, {"a": 2}]')
    assert [isinstance(row, InputError) for _, row in read(path)] == [False, True, False]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_an_empty_file(tmp_path, name):
    path = tmp_path / name
    for content in (b"", b" \n\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: the file has no rows"):
            read_prompts(path)


def test_missing_sources(tmp_path):
    refused(tmp_path / "none.jsonl", ": no such file")
    refused(tmp_path / "none", ": no such file")
    refused(f"{tmp_path}/none:train", ": no such file")
    refused("data/none.parquet", ": no such file")
    refused(tmp_path, ": is a directory without files of rows (.jsonl, ")


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------


@pytest.fixture
def pa():
    return pytest.importorskip("pyarrow")


def write_parquet(pa, path, rows, **columns):
    from pyarrow import parquet

    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        table = table.append_column(name, values)
    parquet.write_table(table, path, row_group_size=2)
    return table


MESSAGES = [[{"role": "user", "content": f"question {i}"}] for i in range(5)]


def test_parquet(tmp_path, pa):
    path = tmp_path / "rows.parquet"
    given = [{"prompt": m, "score": None if i == 1 else i / 2, "n": i} for i, m in enumerate(MESSAGES)]
    write_parquet(
        pa,
        path,
        given,
        category=pa.array(["x", "y", "x", "y", "x"]).dictionary_encode(),
        image=pa.array([b"\xff"] * 5),
        day=pa.array([0] * 5, pa.date32()),
        nested=pa.array([{"bytes": b"1", "path": "p"}] * 5),
        nan=pa.array([float("nan")] * 5),
    )
    expected = [{**row, "category": "xyxyx"[i], "nan": None} for i, row in enumerate(given)]
    assert read(path) == [(f"{path}:row {i + 1}", row) for i, row in enumerate(expected)], (
        "what JSON cannot hold is not read"
    )
    assert json.loads(json.dumps([row for _, row in read(path)], allow_nan=False)) == expected
    assert read_prompts(path)[4] == (f"{path}:row 5", MESSAGES[4])


def test_broken_parquet(tmp_path, pa):
    path = tmp_path / "rows.parquet"
    for content in (b"", b"PAR1 nothing PAR1", lines()):
        path.write_bytes(content)
        refused(path, ": not a readable Parquet file: ")
    write_parquet(pa, path, [{"prompt": "a" * 100}] * 50)
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + b"\x00" * 40 + whole[48:])
    refused(path, ": not a readable Parquet file: ")
    pa.parquet.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    refused(path, ": has two columns 'a'; rename one")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("rows.parquet", "rows.arrow"):
        (tmp_path / name).write_bytes(b"PAR1")
        refused(tmp_path / name, ": Parquet and Arrow files are read with pyarrow: pip install pyarrow")


def write_arrow(pa, path, rows, *, footer=False):
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_file if footer else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("footer", [False, True])
def test_arrow(tmp_path, pa, footer):
    path = tmp_path / "rows.arrow"
    rows = [{"prompt": m} for m in MESSAGES]
    write_arrow(pa, path, rows, footer=footer)
    assert read(path) == [(f"{path}:row {i + 1}", row) for i, row in enumerate(rows)]
    path.write_bytes(path.read_bytes()[:40])
    refused(path, ": not a readable Arrow file: ")


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_directory_of_files(tmp_path):
    for name, value in (("train-00001-of-00002", 2), ("train-00000-of-00002", 1), ("test-00000-of-00001", 3)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"prompt": str(value)}]))
    (tmp_path / "README.md").write_text("---\n")

    def prompts(source):
        return [row["prompt"] for _, row in sources.rows(source)]

    assert prompts(tmp_path) == prompts(f"{tmp_path}:train") == ["1", "2"]
    assert prompts(f"{tmp_path}:test") == ["3"]
    assert read(f"{tmp_path}:test")[0][0] == f"{tmp_path}/test-00000-of-00001.jsonl:1"
    with pytest.raises(
        InputError, match=f"^{tmp_path}: has no split 'dev'; give {tmp_path}:SPLIT with one of test, train$"
    ):
        prompts(f"{tmp_path}:dev")
    hashes = {sources.sha256(source) for source in (tmp_path, f"{tmp_path}:train")}
    assert len(hashes) == 1 and sources.sha256(f"{tmp_path}:test") not in hashes
    (tmp_path / "train-00001-of-00002.jsonl").write_bytes(lines([{"prompt": "other"}]))
    assert sources.sha256(tmp_path) not in hashes


def test_a_directory_of_numbered_files_and_one_of_several_sets(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(12):
        (data / f"{i:04}.jsonl").write_bytes(lines([{"prompt": str(i)}]))
    assert [row["prompt"] for _, row in sources.rows(tmp_path)] == [str(i) for i in range(12)]
    (data / "extra.jsonl").write_bytes(lines())
    refused(tmp_path, f": which split? Give {tmp_path}:SPLIT with one of data, extra")
    assert len(read(f"{tmp_path}:extra")) == 2


def save_to_disk(pa, directory, *parts):
    """What `Dataset.save_to_disk` of the package datasets writes, as far as it is read."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        write_arrow(pa, directory / name, rows)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (directory / "dataset_info.json").write_text("{}")
    write_arrow(pa, directory / "cache-1234.arrow", [{"indices": 0}])


def test_a_saved_data_set(tmp_path, pa):
    directory = tmp_path / "set"
    save_to_disk(pa, directory, [{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "c"}])
    assert [row["prompt"] for _, row in sources.rows(directory)] == ["a", "b", "c"]
    with pytest.raises(InputError, match="holds one data set without splits; leave :train out"):
        read(f"{directory}:train")
    (directory / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match="data-00001-of-00002.arrow: no such file; the saved data set is not complete"):
        read(directory)
    (directory / "state.json").write_text("{}")
    refused(directory, ": state.json is not that of a saved data set; save it again")
    (tmp_path / "secret.arrow").write_bytes(b"")
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(InputError, match="set/secret.arrow: no such file"):
        read(directory)


def test_saved_splits(tmp_path, pa):
    directory = tmp_path / "sets"
    for name in ("test", "validation"):
        save_to_disk(pa, directory / name, [{"prompt": name}])
    (directory / "dataset_dict.json").write_text('{"splits": ["test", "validation"]}')
    refused(directory, f": which split? Give {directory}:SPLIT with one of test, validation")
    assert read(f"{directory}:test")[0][1] == {"prompt": "test"}
    shutil.rmtree(directory / "validation")
    assert read(directory)[0][1] == {"prompt": "test"}, "the only one"
    with pytest.raises(InputError, match="has no split 'train'; give .*:SPLIT with one of test$"):
        read(f"{directory}:train")
    save_to_disk(pa, directory / "train", [{"prompt": "train"}])
    assert read(directory)[0][1] == {"prompt": "train"}


def test_what_datasets_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{i}", "chosen": [{"role": "assistant", "content": "x"}]} for i in range(7)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert [row for _, row in sources.rows(tmp_path / "one")] == rows
    # A selection is saved as it reads.
    datasets.DatasetDict({"train": data.select([5, 2]), "test": data}).save_to_disk(str(tmp_path / "splits"))
    assert [row for _, row in sources.rows(tmp_path / "splits")] == [rows[5], rows[2]]
    assert [row for _, row in sources.rows(f"{tmp_path}/splits:test")] == rows
    data.to_parquet(str(tmp_path / "rows.parquet"))
    data.to_json(str(tmp_path / "rows.jsonl"))
    for name in ("rows.parquet", "rows.jsonl"):
        assert [row for _, row in sources.rows(tmp_path / name)] == rows


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A package datasets whose hub is a mapping: (repository, config) -> splits. No test asks the real one."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(repository, config=None, split=None):
        calls.append((repository, config, split))
        if repository == "offline/set":
            raise ConnectionError("Couldn't reach\nthe Hub")
        data = datasets.DatasetDict(
            {
                name: datasets.Dataset.from_list([{"prompt": f"{name}{i}"} for i in range(3)])
                for name in ("train", "test")
            }
        )
        if repository == "two/sets":
            data["valid"] = data.pop("train")
        return data[split] if split else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir("/")
    return calls


@pytest.mark.parametrize(
    "name, call, first",
    [
        ("owner/set", ("owner/set", None, None), "train0"),
        ("owner/set:test", ("owner/set", None, "test"), "test0"),
        ("owner/set-1.0_x:main:test", ("owner/set-1.0_x", "main", "test"), "test0"),
    ],
)
def test_a_data_set_of_the_hub(hub, name, call, first):
    rows = read(name)
    assert hub == [call] and len(rows) == 3 and rows[0] == (f"{name}:row 1", {"prompt": first})
    assert rows[2][0] == f"{name}:row 3"
    assert (sources.sha256(name) == sources.sha256("owner/set:test")) == (first == "test0")


def test_a_directory_here_wins_over_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "owner" / "set").mkdir(parents=True)
    (tmp_path / "owner" / "set" / "rows.jsonl").write_bytes(lines([{"prompt": "here"}]))
    monkeypatch.chdir(tmp_path)
    assert read("owner/set")[0][1] == {"prompt": "here"} and not hub


def test_the_hub_out_of_reach(hub):
    refused("offline/set", ": no such file or directory here, and no data set that loads from the hub (OWNER/NAME")
    refused("two/sets", ": which split? Give two/sets:SPLIT with one of test, valid")


def test_the_hub_without_datasets_or_with_an_old_one(monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("owner/set", ": no such file or directory; a data set of the Hugging Face hub is read with datasets: pip")
    old = types.SimpleNamespace(__version__="2.14.0")
    monkeypatch.setitem(sys.modules, "datasets", old)
    refused("owner/set", ": needs datasets 5 or newer, not 2.14.0")


def test_suffixes_are_those_that_are_read(tmp_path):
    for suffix in files.SUFFIXES:
        (tmp_path / f"x{suffix}").write_bytes(b"")
    assert {path.suffix for path in sources.local_files(f"{tmp_path}:x")} == {
        ".jsonl",
        ".ndjson",
        ".gz",
        ".json",
        ".parquet",
        ".arrow",
    }
