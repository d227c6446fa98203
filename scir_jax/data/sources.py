"""Where rows come from: a file, a directory of them, a saved data set, or a data set of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from scir_jax.bucket import fetched
from scir_jax.bucket.objects import in_bucket
from scir_jax.data import files
from scir_jax.errors import InputError

_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<first>[^:/]+))?(:(?P<second>[^:/]+))?")
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?$")


def rows(source: str | Path | list) -> files.Places:
    """Reads the rows of a data source, or takes a list of rows.

    A path that exists is taken first: a file, or a directory with files or with what `save_to_disk` of the package
    datasets wrote (PATH:SPLIT chooses a split). Else OWNER/NAME, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT is a data
    set of the hub. Without a choice `train` or the only split is taken.

    Returns:
      (where, row or its error) of each row.

    Raises:
      InputError: the source is missing or cannot be read as a whole.
    """
    if isinstance(source, list):
        return ((f"row {i}", _mapping(row, f"row {i}")) for i, row in enumerate(source, 1))
    local = local_files(str(source))
    if local is None:
        return _hub_rows(str(source))
    return chain.from_iterable(map(files.rows, local))


def _mapping(row: object, where: str) -> dict | InputError:
    return row if isinstance(row, dict) else InputError(f"{where}: expected a mapping, found {type(row).__name__}")


def sha256(source: str | Path) -> str:
    """Computes the SHA-256 of a file, of a directory's files that are read, or of the rows of a hub's data set.

    Raises:
      InputError: the source is missing.
    """
    local = local_files(str(source))
    if local is None:
        digest = hashlib.sha256()
        for _, row in _hub_rows(str(source)):
            digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()
    digests = []
    for path in local:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def local_files(source: str) -> list[Path] | None:
    """Lists the files that a source on this machine consists of, in order.

    Returns:
      The files, or None where the name can only be the hub's.

    Raises:
      InputError: the path does not exist, or is a directory without files that can be read.
    """
    path = fetched.data(source) if in_bucket(source) else Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _directory_files(path, None)
    directory, _, split = source.rpartition(":")
    if directory and "/" not in split and Path(directory).is_dir():
        return _directory_files(Path(directory), split)
    if not _HUB_NAME.fullmatch(source) or source.lower().endswith(files.SUFFIXES):
        raise InputError(f"{source}: no such file")
    return None


def _directory_files(directory: Path, split: str | None) -> list[Path]:
    if (directory / "dataset_dict.json").is_file():
        names = [p.parent.name for p in sorted(directory.glob("*/state.json"))]
        return _saved_files(directory / _choose(names, split, str(directory)))
    if (directory / "state.json").is_file():
        if split:
            raise InputError(f"{directory}: holds one data set without splits; leave :{split} out")
        return _saved_files(directory)
    found = [p for folder in (directory, directory / "data") for p in _files(folder)]
    if not found:
        kinds = ", ".join(files.SUFFIXES)
        raise InputError(f"{directory}: is a directory without files of rows ({kinds})")
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in found:
        suffix = next(s for s in sorted(files.SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s))
        stem = path.name[: -len(suffix)]
        groups[_SHARD.sub("", stem) or "data"].append(path)
    return groups[_choose(list(groups), split, str(directory))]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.is_file() and p.name.lower().endswith(files.SUFFIXES))


def _saved_files(directory: Path) -> list[Path]:
    """Lists the Arrow files of a data set as `save_to_disk` writes it."""
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        names = [item["filename"] for item in state["_data_files"]]
        # A file of another directory is not part of this data set.
        paths = [directory / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{directory}: state.json is not that of a saved data set; save it again") from None
    if missing := next((p for p in paths if not p.is_file()), None):
        raise InputError(f"{missing}: no such file; the saved data set is not complete")
    return paths


def _choose(splits: list[str], split: str | None, source: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    chosen = split or "train"
    if chosen not in splits:
        names = ", ".join(sorted(splits)) or "none"
        what = f"has no split {split!r}; give" if split else "which split? Give"
        raise InputError(f"{source}: {what} {source}:SPLIT with one of {names}")
    return chosen


def _hub_rows(source: str) -> Iterator:
    match = _HUB_NAME.fullmatch(source)
    repository = match["repository"]
    config, split = (match["first"], match["second"]) if match["second"] else (None, match["first"])
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{source}: no such file or directory; a data set of the Hugging Face hub is read with datasets: "
            "pip install datasets"
        ) from None
    # Older versions run code that comes with a data set, or unpickle its files.
    if int(datasets.__version__.split(".")[0]) < 5:
        raise InputError(f"{source}: needs datasets 5 or newer, not {datasets.__version__}: pip install -U datasets")
    try:
        data = datasets.load_dataset(repository, config, split=split)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{source}: no such file or directory here, and no data set that loads from the hub "
            f"(OWNER/NAME:CONFIG:SPLIT): {reason}"
        ) from None
    if isinstance(data, dict):
        data = data[_choose(list(data), None, source)]
    columns = files.plain_columns(data.features.arrow_schema, source)
    return files.table_rows(data.select_columns(columns).with_format("arrow").iter(1024), source)
