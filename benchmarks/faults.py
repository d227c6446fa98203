"""What becomes of a run whose disk, or bucket, fails at each kind of file that it writes.

    python benchmarks/faults.py
    python benchmarks/faults.py --bucket

It makes the small run of benchmarks/corruptions.py once, and notes the kinds of files and directories that it writes, in
order. Then, for each error, it begins that run anew: nothing can be written from the first file of the first kind on, the
same command goes on until the first file of the second kind, and so on to the end. One row per error. The columns
"traceback" and "no sentence" must be 0, and each run that ended must be equal to the first one.

On a disk what TensorStore writes of a checkpoint's arrays is not met, but the directories around it are. The bucket is the
tests' stand-in.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from corruptions import lightly, make, results

ERRORS = {"no space": errno.ENOSPC, "read-only": errno.EROFS, "no permission": errno.EACCES, "broken": errno.EIO}
IN_BUCKET = {"refused": "deny_from", "gone": "stop_from"}
OUTCOMES = ("one sentence", "goes on", "traceback", "no sentence")
BAD = OUTCOMES[-2:]


@dataclasses.dataclass
class Disk:
    """A run's directory, which takes everything, or nothing from the first file of a kind on."""

    directory: Path
    kind: str | None = None
    error: str = ""
    met: bool = False
    seen: dict[str, None] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        """Raises the disk's error where something would be written; Python calls it."""
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.rename", "os.mkdir"):
            path = arguments[0]
        else:
            return
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if not name.startswith(f"{self.directory}/"):
            return
        kind = f"{event.removeprefix('os.')} {kind_of(name.removeprefix(f'{self.directory}/'))}"
        self.seen.setdefault(kind)
        self.met |= kind == self.kind
        if self.met:
            raise OSError(ERRORS[self.error], os.strerror(ERRORS[self.error]), name)

    def kinds(self) -> list[str]:
        """Lists the kinds of what was written, in order."""
        return list(self.seen)

    def breaks(self, kind: str | None, error: str = "") -> None:
        """Orders the place from which on nothing is written; None mends the disk."""
        self.kind, self.error, self.met = kind, error, False

    def results(self) -> dict[str, bytes]:
        """Reads all that the run found out."""
        return results(self.directory)

    def clear(self) -> None:
        """Removes the run."""
        shutil.rmtree(self.directory)

    def run(self, argv: list[str], log: Path) -> tuple[int, str]:
        """Runs the training command in this process -> its exit code, and what it wrote; a traceback is 1."""
        from scir_jax import train
        from scir_jax.run import command

        code = 0
        with lightly(log):
            try:
                command.main(lambda: train.main(argv))
            except SystemExit as stop:
                code = stop.code or 0
            except Exception as error:
                code = 1
                print(repr(error), file=sys.stderr)
        return code, log.read_text(errors="replace")


class InBucket:
    """The same of a run in the stand-in for a bucket."""

    def __init__(self, folder: Path):
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests.gcs import Bucket

        self.folder, self.bucket = folder, Bucket(folder)
        self.url = f"gs://{self.bucket.name}/run"

    @property
    def met(self) -> bool:
        """Whether the bucket has begun to fail."""
        return self.bucket.met()

    def kinds(self) -> list[str]:
        """Lists the kinds of what was written, in order."""
        names = [name for name in self.bucket.writes() if not name.endswith(".lease")]
        return list(dict.fromkeys(map(kind_of, names)))

    def breaks(self, kind: str | None, error: str = "") -> None:
        """Orders the place from which on nothing is written; None mends the bucket."""
        digits = re.escape(kind or "").replace(re.escape("#"), "[0-9a-f]+")
        self.bucket.faults(**{IN_BUCKET[error]: digits} if kind else {})

    def results(self) -> dict[str, bytes]:
        """Reads all that the run found out."""
        copy = self.bucket.copy("run", self.folder / "copy")
        found = results(copy)
        shutil.rmtree(copy)
        return found

    def clear(self) -> None:
        """Removes the run."""
        self.bucket.clear()

    def run(self, argv: list[str], log: Path) -> tuple[int, str]:
        """Runs the training command in a process of its own -> its exit code, and what it wrote."""
        from tests.forks import ROOT, Fork, environment, quick
        from tests.strikes import Strike

        env = environment(**quick(), **self.bucket.environment)
        process = Fork([*Strike(ahead=False).command, *argv], env=env, cwd=ROOT, out=self.folder / "out", err=log)
        return process.wait(), log.read_text(errors="replace")


def kind_of(name: str) -> str:
    """Names the kind of a file: its path without what differs between files of one kind."""
    name = re.sub(r"[0-9a-f]{8,}|(?<=-)\d+", "#", name)
    return re.sub(r"\d+", "#", name)


def outcome_of(code: int, said: str) -> str:
    if code == 1 or "Traceback" in said:
        return "traceback"
    if code == 0:
        return "goes on"
    return "one sentence" if said.rstrip("\n").rpartition("\n")[2].startswith("error: ") else "no sentence"


def chain(place: Disk | InBucket, argv: list[str], log: Path, kinds: list[str], error: str, expected) -> dict[str, int]:
    """Breaks a run at each kind -> how often it ended how, runs that ended, and those of them equal to `expected`."""
    counts: Counter[str] = Counter()

    def end() -> None:
        counts["ended"] += 1
        counts["equal"] += place.results() == expected
        place.clear()

    for at, kind in enumerate(kinds):
        for _ in range(2):  # once more from the start where what comes before it is there already
            place.breaks(kind, error)
            code, said = place.run(argv, log)
            met = place.met
            place.breaks(None)
            if met:
                outcome = outcome_of(code, said)
                counts[outcome] += 1
                counts["places"] += 1
                if outcome in BAD:
                    print(f"\n{kind}: {said[-1500:]}", file=sys.stderr)
            if code == 0:
                end()
            if met:
                break
        else:
            print(f"\n{kind}: was not written again", file=sys.stderr)
        print(f"\r{at + 1}/{len(kinds)}", end="", file=sys.stderr)
    if place.run(argv, log)[0] == 0:
        end()
    else:
        counts["ended"] += 1
    return counts


def main() -> int:
    """Breaks a disk or a bucket and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", action="store_true", help="a bucket instead of a disk")
    parser.add_argument("--errors", nargs="+", help="by default all: " + ", ".join([*ERRORS, *IN_BUCKET]))
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    arguments = parser.parse_args()
    errors = arguments.errors or list(IN_BUCKET if arguments.bucket else ERRORS)
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        argv, log = make(directory, 0), directory / "log"
        place: Disk | InBucket = InBucket(directory) if arguments.bucket else Disk(directory / "run")
        if isinstance(place, InBucket):
            argv += ["--run.directory", place.url]
        if place.run(argv, log)[0]:
            raise SystemExit(log.read_text())
        expected, kinds = place.results(), place.kinds()
        place.clear()
        for error in errors:
            rows[error] = chain(place, argv, log, kinds, error, expected)
            if arguments.output:
                arguments.output.write_text(json.dumps({"kinds": kinds, "rows": rows}, indent=1) + "\n")
        if isinstance(place, InBucket):
            place.bucket.close()
    print(f"\n{len(kinds)} kinds of files and directories")
    columns = ("places", *OUTCOMES, "ended", "equal")
    print(f"{'error':<16}" + "".join(f"{column:>14}" for column in columns))
    for error, row in rows.items():
        print(f"{error:<16}" + "".join(f"{row.get(column, 0):>14}" for column in columns))
    whole = all(row["ended"] == row["equal"] for row in rows.values())
    return 0 if whole and not any(row.get(bad) for row in rows.values() for bad in BAD) else 1


if __name__ == "__main__":
    sys.exit(main())
