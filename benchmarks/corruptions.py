"""What becomes of a run whose files were changed behind its back.

    python benchmarks/corruptions.py --trials 200

It makes a small run of two iterations, kills a copy of it within the second one, and then, again and again, changes one
file of a copy of that (a flipped bit, a cut end, a lost line, another file's content) and resumes it with the same
command. The files of the world, from which the run was made, are changed too. One row per kind of file; the last two
columns must be 0. A change is harmless where the run's models, answers, pairs, decisions and metrics are equal to those
of the run that nothing was done to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
from markupsafe import Markup

OUTCOMES = ("refused", "named and taken", "harmless", "refused without name", "traceback", "silent")
BAD = OUTCOMES[-2:]
# Files that nothing reads again, or that are locks.
LEFT_OUT = ("tensorboard", ".lock", "report.html", "export", "events.")
RESULTS = ("metrics.jsonl", "responses.jsonl", "pairs.jsonl", "decisions.jsonl", "evaluation.json", "model.safetensors")
TIMES = ("seconds", "tokens_per_second", "teraflops", "mfu")


def make(directory: Path, seed: int) -> list[str]:
    """Makes a small world with a random model -> the command line of a run in directory / "run"."""
    import jax

    from scir_jax.model import decoder, families
    from scir_jax.model.hf import weights
    from scir_jax.world.files import WorldSpec, write_world

    world = directory / "world"
    rows = dict(base_documents=8, base_comparisons=8, ift_documents=24, eft_comparisons=12, prompts=24)
    held = dict(heldout_prompts=8, heldout_pairs=8)
    write_world(world, WorldSpec(**rows, **held, hidden_size=32, intermediate_size=64, layers=2, head_dim=8))
    config = weights.hf_config(world / "untrained")
    arch = families.read(config, "config.json")
    params = jax.tree.map(np.asarray, jax.jit(decoder.define(arch).init)(jax.random.key(seed)))
    weights.save(world / "model", arch, params, config=config, source=world / "untrained")
    settings = {
        "run": {"directory": str(directory / "run"), "iterations": 2, "tensorboard": False, "auto": False},
        "world": {"directory": None},
        "model": {"path": str(world / "model")},
        "data": {key: str(world / f"{key}.jsonl") for key in ("prompts", "ift", "eft", "heldout_pairs")},
        "text": {"max_prompt_tokens": 32, "max_response_tokens": 12},
        "sft": {"ift_batch_size": 8, "eft_batch_size": 8, "learning_rate": 1e-3},
        "sample": {"responses": 2, "prompts": 12, "batch_size": 12},
        "generative": {"templates": [str(world / "judge.yaml")]},
        "replay": {"eft_batch_size": 8},
        "optimise": {"batch_size": 4, "learning_rate": 1e-3, "epochs": 2},
        "checkpoint": {"every": 1},
        "evaluate": {"batch_size": 8},
    }
    settings["run"]["compilation_cache"] = str(directory / "compiled")
    file = directory / "run.json.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return ["--config", str(file)]


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Sends what is printed into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in zip((1, 2), before):
            os.dup2(kept, number)
            os.close(kept)


@contextlib.contextmanager
def lightly(log: Path) -> Iterator[None]:
    """Runs of this process write into a file, compile nothing before the first stage and draw no figure."""
    from scir_jax.report import page
    from scir_jax.run import preflight

    no_table = mock.patch.object(preflight, "check_memory", lambda *_: [])
    with quiet(log), no_table, mock.patch.object(page, "panel", lambda *_, **__: Markup("")):
        yield


def resume(argv: list[str], log: Path) -> tuple[str, str]:
    """Runs the command in this process -> "done", "refused" or "traceback", and what it said."""
    from scir_jax import train
    from scir_jax.errors import InputError

    said, end = "", "done"
    with lightly(log):
        try:
            train.main(argv)
        except InputError as error:
            said, end = str(error), "refused"
        except (Exception, SystemExit) as error:  # whatever it is that a user would see
            said, end = repr(error), "traceback"
    return end, log.read_text(errors="replace") + said


def results(run: Path) -> dict[str, bytes]:
    """Reads all that a run found out, without the times that its steps took."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.name in RESULTS and "checkpoints" not in path.parts:
            content = path.read_bytes()
            if path.name == "metrics.jsonl":
                rows = [json.loads(line) for line in content.splitlines()]
                content = json.dumps([{k: v for k, v in row.items() if k not in TIMES} for row in rows]).encode()
            found[path.relative_to(run).as_posix()] = content
    return found


def kill_within(argv: list[str], run: Path) -> None:
    """Runs the command in a process of its own, and kills it in the second iteration's training."""
    process = subprocess.Popen([sys.executable, "-m", "scir_jax.train", *argv], stdout=-3, stderr=-3)
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if sum('"iteration": 2' in line for line in lines) >= 3:
            process.kill()
        time.sleep(0.02)
    process.wait()
    if (run / "checkpoints" / "M3").exists():
        raise SystemExit("the run ended before it could be killed; try again")


# --- changes ----------------------------------------------------------------------------------------------------------


def flip(path: Path, others: list[Path], rng: np.random.Generator) -> None:
    """Flips a bit."""
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def cut(path: Path, others: list[Path], rng: np.random.Generator) -> None:
    """Cuts the end off."""
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(len(content)))])


def lose(path: Path, others: list[Path], rng: np.random.Generator) -> None:
    """Loses a line."""
    lines = path.read_bytes().split(b"\n")
    del lines[int(rng.integers(len(lines)))]
    path.write_bytes(b"\n".join(lines))


def swap(path: Path, others: list[Path], rng: np.random.Generator) -> None:
    """Takes the content of a file of the same name, of another iteration or model."""
    alike = [other for other in others if other.name == path.name and other != path]
    if alike:
        shutil.copyfile(alike[int(rng.integers(len(alike)))], path)
    else:
        flip(path, others, rng)


CHANGES: tuple[Callable[[Path, list[Path], np.random.Generator], None], ...] = (flip, cut, lose, swap)


def kind_of(path: Path) -> str:
    """Names the row of the table that a file belongs to."""
    if "checkpoints" in path.parts:
        return "checkpoints" if path.name != "arrays.json" else path.name
    return "world" if "world" in path.parts else path.name


def trial(directory: Path, argv: list[str], expected: dict[str, bytes], rng: np.random.Generator) -> dict[str, str]:
    """Changes a file of the killed run and resumes it."""
    for name in ("run", "world"):
        shutil.rmtree(directory / name, ignore_errors=True)
        shutil.copytree(directory / "kept" / name, directory / name)
    files = [
        path
        for name in ("run", "world")
        for path in sorted((directory / name).rglob("*"))
        if path.is_file() and path.stat().st_size and not any(part in str(path) for part in LEFT_OUT)
    ]
    kinds = sorted({kind_of(path) for path in files})
    # Each kind as often as the others, however many files it has.
    kind = kinds[int(rng.integers(len(kinds)))]
    alike = [path for path in files if kind_of(path) == kind]
    path = alike[int(rng.integers(len(alike)))]
    change = CHANGES[int(rng.integers(len(CHANGES)))]
    before = path.read_bytes()
    change(path, files, rng)
    where = path.relative_to(directory)
    if path.read_bytes() == before:
        return {"kind": kind, "change": change.__name__, "file": str(where), "outcome": "harmless", "said": ""}
    end, said = resume(argv, directory / "log")
    # A checkpoint and a model are named by their directories, data by their setting, a configuration by its keys.
    names = [path.name, *(part for part in where.parts[2:-1] if "checkpoints" in where.parts)]
    names += [f"data.{path.stem}", str(path.parent)] if kind == "world" else []
    names += ["these keys differ"] if kind == "config.yaml" else []
    named = any(name in said for name in names)
    if end == "refused":
        outcome = "refused" if named else "refused without name"
    elif end == "traceback":
        outcome = "traceback"
    else:
        same = results(directory / "run") == expected
        outcome = "harmless" if same else "named and taken" if named else "silent"
    return {"kind": kind, "change": change.__name__, "file": str(where), "outcome": outcome, "said": said[-400:]}


def main() -> int:
    """Runs the trials and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON Lines file of the trials")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    found = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        argv = make(directory, arguments.seed)
        resume(argv, directory / "log")
        expected = results(directory / "run")
        shutil.rmtree(directory / "run")
        kill_within(argv, directory / "run")
        for part in ("run", "world"):
            shutil.copytree(directory / part, directory / "kept" / part)
        if resume(argv, directory / "log")[0] != "done" or results(directory / "run") != expected:
            raise SystemExit("a run that was only killed does not end like one that was not")
        for number in range(arguments.trials):
            found.append(trial(directory, argv, expected, rng))
            if arguments.output:
                arguments.output.write_text("".join(json.dumps(row) + "\n" for row in found))
            print(f"\r{number + 1}/{arguments.trials}", end="", file=sys.stderr)
            if found[-1]["outcome"] in BAD:
                print(f"\n{found[-1]}", file=sys.stderr)
    counts = Counter((row["kind"], row["outcome"]) for row in found)
    print(f"\n{'file':<22}{'trials':>8}" + "".join(f"{outcome:>22}" for outcome in OUTCOMES))
    for kind in sorted({row["kind"] for row in found}):
        of_kind = [counts[kind, outcome] for outcome in OUTCOMES]
        print(f"{kind:<22}{sum(of_kind):>8}" + "".join(f"{count:>22}" for count in of_kind))
    return 1 if any(row["outcome"] in BAD for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
