"""Rows of one file: JSON Lines, JSON, Parquet or Arrow. A row that cannot be read is named by file and line."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scir_jax.errors import InputError

JSONL = (".jsonl", ".ndjson", ".jsonl.gz")
SUFFIXES = (*JSONL, ".json", ".json.gz", ".parquet", ".arrow")
_OTHER = (".csv", ".tsv", ".txt", ".xlsx", ".zip", ".zst", ".pkl", ".pickle", ".pt", ".npy", ".npz")

Places = Iterator[tuple[str, dict[str, Any] | InputError]]


def rows(path: Path) -> Places:
    """Reads the rows of a file by its kind.

    Returns:
      (where, row) of each row; a row that cannot be read is given as its error. `where` is file:line in JSON Lines,
        file:row N elsewhere, counted from 1.

    Raises:
      InputError: the whole file cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory, expected a file' if path.is_dir() else 'no such file'}")
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    if name.endswith(".arrow"):
        return _arrow_rows(path)
    if name.endswith((".json", ".json.gz")):
        return _json_rows(path)
    if name.endswith(_OTHER):
        raise InputError(f"{path}: {path.suffix} files are not read; convert it to JSON Lines (.jsonl) or .parquet")
    return _jsonl_rows(path)


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads a JSON Lines file.

    Returns:
      (where, row) of each line; `where` is file:line.

    Raises:
      InputError: the file is missing or empty, or a line (the first one is named) is not UTF-8 or not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory, expected a JSONL file' if path.is_dir() else 'no such file'}")
    result = []
    for where, row in _jsonl_rows(path):
        if isinstance(row, InputError):
            raise row
        result.append((where, row))
    if not result:
        raise InputError(f"{path}: the file has no rows")
    return result


# --- JSON -----------------------------------------------------------------------------------------------------------


def _jsonl_rows(path: Path) -> Places:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{path}: not a readable gzip file: {error}") from None
            if not line:
                return
            number += 1
            if number == 1:
                _check_no_mark(line, f"{path}:1")
            if line.strip():
                where = f"{path}:{number}"
                row: dict[str, Any] | InputError
                try:
                    row = _object(_decode(line.removesuffix(b"\n"), where), where)
                except InputError as error:
                    row = error
                yield where, row


def _json_rows(path: Path) -> Places:
    """Reads a list of objects, {"data": list}, or JSON Lines, which many .json files hold."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable gzip file: {error}") from None
    _check_no_mark(data, f"{path}:1")
    first, _, rest = data.strip().partition(b"\n")
    if first.startswith(b"{") and first.rstrip().endswith(b"}") and rest:
        yield from _jsonl_rows(path)
        return
    if not data.strip():
        return
    value = _decode(data, str(path))
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a list of JSON objects, found {type(value).__name__}")
    for number, row in enumerate(value, start=1):
        where = f"{path}:row {number}"
        yield where, row if isinstance(row, dict) else InputError(f"{where}: {_no_object(row)}")


def _decode(data: bytes, where: str) -> Any:
    """Reads a JSON value strictly: no NaN, no key twice in an object."""
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); convert the file") from None
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if error.lineno > 1 else ""
        raise InputError(f"{where}: broken JSON{line} at column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise InputError(f"{where}: broken JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: {_no_object(value)}")
    return value


def _no_object(value: Any) -> str:
    return f"expected a JSON object, found {type(value).__name__}"


def _check_no_mark(data: bytes, where: str) -> None:
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{where}: starts with a byte-order mark; save the file as UTF-8 without BOM")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)

# --- Parquet and Arrow ----------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Places:
    pyarrow = _pyarrow(path)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = plain_columns(file.schema_arrow, str(path))
            yield from table_rows(file.iter_batches(1024, columns=columns), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {_short(error)}") from None


def _arrow_rows(path: Path) -> Places:
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_stream(source)
                batches = iter(reader)
            except pyarrow.ArrowInvalid:  # the format with a footer
                reader = pyarrow.ipc.open_file(source)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            columns = plain_columns(reader.schema, str(path))
            yield from table_rows((batch.select(columns) for batch in batches), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Arrow file: {_short(error)}") from None


def table_rows(batches: Iterable, name: str) -> Places:
    """Yields the rows of Arrow record batches or tables, numbered on from one to the next.

    A NaN is read as None: it is what a table holds where it has no value.

    Args:
      name: names the file.
    """
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield (
                f"{name}:row {number}",
                {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()},
            )


def plain_columns(schema, name: str) -> list[str]:
    """Returns the names of the columns that JSON could hold: not images, bytes, dates.

    Args:
      schema: Arrow's.
      name: names the file in errors.

    Raises:
      InputError: two columns have one name.
    """
    from pyarrow import types

    def plain(kind) -> bool:
        if types.is_struct(kind):
            return all(plain(field.type) for field in kind)
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return plain(kind.value_type)
        if types.is_dictionary(kind):
            return plain(kind.value_type)
        texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        return texts or numbers or types.is_null(kind)

    names = schema.names
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise InputError(f"{name}: has two columns {twice!r}; rename one")
    return [field.name for field in schema if plain(field.type)]


def _pyarrow(path: Path):
    try:
        import pyarrow
    except ImportError:
        raise InputError(f"{path}: Parquet and Arrow files are read with pyarrow: pip install pyarrow") from None
    return pyarrow


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
