"""Seconds of each stage of a run: what the time is spent on.

    python benchmarks/iteration.py                        # the quickstart
    python benchmarks/iteration.py --config ... --run.directory runs/timed

It runs the training command with these arguments in a process of its own, and prints one row per model and stage, with
tokens per second in training. The last row is what is not a stage: starting, compiling and the report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path


def stages(directory: Path) -> list[tuple[str, str, float]]:
    """Reads (model, stage, seconds) of a run."""
    found = []
    for path in sorted(directory.glob("iteration_*/seconds.json")):
        number = int(path.parent.name.removeprefix("iteration_"))
        found += [(f"M{number + 1}", name, seconds) for name, seconds in json.loads(path.read_text()).items()]
    return found


def rates(directory: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Reads tokens per second and the share of computed places that hold a token, of the training stages."""
    sums = defaultdict(lambda: [0.0, 0.0, 0.0])
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        one = sums[f"M{row['iteration'] + 1}", row["stage"]]
        one[0] += row["tokens"]
        one[1] += row["seconds"]
        one[2] += row["tokens"] / row["filled"]
    return {key: (tokens / seconds, tokens / places) for key, (tokens, seconds, places) in sums.items()}


def main() -> int:
    """Runs the command and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    own, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "run"
        if "--run.directory" in rest:
            directory = Path(rest[rest.index("--run.directory") + 1])
        else:
            rest = [*rest, "--run.directory", str(directory)]
        started = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "scir_jax.train", *rest], stdout=subprocess.DEVNULL).returncode
        if code:
            return code
        total = time.monotonic() - started
        found, speeds = stages(directory), rates(directory)
    print(f"{'model':<7}{'stage':<12}{'seconds':>9}{'share':>8}{'tokens/s':>10}{'real':>7}")
    for model, name, seconds in found:
        rate, real = speeds.get((model, name), (None, None))
        more = f"{rate:>10,.0f}{real:>7.0%}" if rate else ""
        print(f"{model:<7}{name:<12}{seconds:>9.1f}{seconds / total:>8.0%}{more}")
    rest_seconds = total - sum(seconds for *_, seconds in found)
    print(f"{'':<7}{'the rest':<12}{rest_seconds:>9.1f}{rest_seconds / total:>8.0%}")
    if own.output:
        rows = [dict(model=model, stage=name, seconds=seconds) for model, name, seconds in found]
        own.output.write_text(json.dumps({"command": rest, "total": total, "stages": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
