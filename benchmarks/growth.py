"""Whether the host's memory grows over a long run: resident bytes of a tiny run by its steps.

    python benchmarks/growth.py --steps 10000

It makes the small world of benchmarks/corruptions.py and trains one iteration of so many steps on it. One row per tenth
of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corruptions import make

PAIRS = 12
"""of the iteration: 12 prompts, one pair each; 3 steps of 4 pairs go over them once"""


def resident(process: int) -> int:
    """Returns the resident bytes of a process, 0 where it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0)


def main() -> int:
    """Prints the table; the exit code is 1 where the second half of the steps grew by more than a fiftieth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    arguments = parser.parse_args()
    found: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        child = os.fork()
        if not child:  # JAX computes in a process of its own, so that this one holds nothing
            make(directory, 0)
            os._exit(0)
        os.waitpid(child, 0)
        argv = ["--config", str(directory / "run.json.yaml"), "--run.iterations", "1", "--checkpoint.every", "1000"]
        argv += ["--optimise.epochs", str(-(-arguments.steps * 4 // PAIRS))]
        log = (directory / "log").open("wb")
        process = subprocess.Popen([sys.executable, "-m", "scir_jax.train", *argv], stdout=log, stderr=log)
        metrics, read, steps = directory / "run" / "metrics.jsonl", 0, 0
        while process.poll() is None:
            if metrics.exists():
                with metrics.open("rb") as file:
                    file.seek(read)
                    lines = file.read().split(b"\n")
                read += sum(len(line) + 1 for line in lines[:-1])
                steps += sum(b'"optimise"' in line for line in lines[:-1])
                tenth = 10 * steps // arguments.steps
                if tenth and tenth not in found and (size := resident(process.pid)):
                    found[tenth] = size
            time.sleep(0.2)
        if process.returncode:
            print((directory / "log").read_text(errors="replace")[-1000:], file=sys.stderr)
            return 1
    print("steps    resident MiB")
    for tenth, size in sorted(found.items()):
        print(f"{tenth * arguments.steps // 10:>6,}  {size / 2**20:>12,.0f}")
    if arguments.output:
        rows = {tenth * arguments.steps // 10: size for tenth, size in found.items()}
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    half = found.get(5, found[min(found)])
    return int(found[max(found)] > 1.02 * half)


if __name__ == "__main__":
    sys.exit(main())
