"""Runs that are killed at random moments, until they are done, against one that was not.

    python benchmarks/kills.py --kills 100

It makes the small run of benchmarks/corruptions.py, then starts it again and again and kills it (SIGKILL) after a random
time, until so many kills have been done; a run that ends is compared, and another one begins. One row per stage in which
a kill came.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from corruptions import make, results, resume


def stage_of(run: Path) -> str:
    """Says how far a run has come, from its files."""
    models = sorted(path.name for path in (run / "checkpoints").glob("M?"))
    iterations = sorted(run.glob("iteration_*"))
    files = sorted(path.name for path in iterations[-1].iterdir()) if iterations else []
    return f"after {models[-1] if models else 'the start'}" + (f", {len(files)} files of it" if files else "")


def counted_once(run: Path) -> bool:
    """Checks that metrics.jsonl has each step of the run exactly once."""
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return steps == list(range(1, len(steps) + 1))


def main() -> int:
    """Kills runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    where: Counter[str] = Counter()
    finished = equal = kills = 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run, argv = directory / "run", make(directory, arguments.seed)
        resume(argv, directory / "log")
        expected = results(run)
        shutil.rmtree(run)
        command = [sys.executable, "-m", "scir_jax.train", *argv]
        started = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        whole = time.monotonic() - started
        while True:
            if (run / "summary.json").exists() and (run / "report.html").exists():
                finished += 1
                equal += results(run) == expected and counted_once(run)
                if kills >= arguments.kills:
                    break
                shutil.rmtree(run)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            try:
                _, error = process.communicate(timeout=float(rng.uniform(0, 1.2 * whole)))
                if process.returncode:
                    print(error, file=sys.stderr)
                    return 1
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                where[stage_of(run) if run.exists() else "before the run"] += 1
                print(f"\r{kills}/{arguments.kills}", end="", file=sys.stderr)
    print(f"\n{kills} kills, {finished} runs finished, {equal} of them equal to the bit with each step once")
    for stage, number in sorted(where.items()):
        print(f"{number:>5}  {stage}")
    return 0 if equal == finished else 1


if __name__ == "__main__":
    sys.exit(main())
