"""Stands in for the train command in tests of studies: it reads the configuration and writes a summary at once.

The quality is a known function of the learning rate, the seed and the iteration. What a file `behaviour.json` in the
study's directory says of a part of the run's path happens instead: an exit code, or seconds to sleep.
"""

import fcntl
import json
import math
import sys
import time
from pathlib import Path

PEAK = 4e-4
"""the learning rate with the best quality"""


def quality(rate: float, seed: int, iteration: int) -> float:
    return 0.5 + 0.001 * (seed % 10) + iteration * (0.1 - 0.02 * abs(math.log2(rate / PEAK)))


def run(config: dict) -> int:
    directory, iterations = Path(config["run"]["directory"]), int(config["run"]["iterations"])
    directory.mkdir(parents=True, exist_ok=True)
    root = next(parent for parent in directory.parents if parent.name in ("runs", "starts")).parent
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (root / "calls.txt").open("a") as calls:
            print(directory.relative_to(root), iterations, file=calls)
        behaviour = root / "behaviour.json"
        for part, does in (json.loads(behaviour.read_text()) if behaviour.exists() else {}).items():
            if part in str(directory):
                time.sleep(does.get("sleep", 0))
                if code := does.get("code", 0):
                    print("some lines", "error: what is wrong", sep="\n")
                    return code
        start = config["run"]["start_from"]
        assert start is None or (Path(start) / "summary.json").exists()
        rate, seed = config["optimise"]["learning_rate"], int(config["run"]["seed"])
        rows = [
            {"model": f"M{t + 1}", "quality": quality(rate, seed, t), "agreement": 0.5 + 0.01 * t, "seconds": 2.0}
            for t in range(iterations + 1)
        ]
        stages = [
            {
                "iteration": t,
                "stage": stage,
                "seconds": 2.0,
                "generated": 10,
                "flops": None,
                "memory": 5 + t,
                "memory_of": "x",
            }
            for t in range(len(rows))
            for stage in ("sample", "evaluate")
        ]
        (directory / "summary.json").write_text(json.dumps({"rows": rows, "costs": {"stages": stages}}))
    return 0


def read(text: str) -> dict:
    """Reads what is needed of a configuration: sections of plain values."""
    config, section = {}, {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(": ")
        if not line.startswith((" ", "-")):
            section = config.setdefault(key.rstrip(":"), {})
        elif value:
            section[key] = None if value == "null" else float(value) if value[0].isdigit() else value
    return config


if __name__ == "__main__":
    sys.exit(run(read(Path(sys.argv[2]).read_text())))
