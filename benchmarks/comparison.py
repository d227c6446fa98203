"""What the comparisons have in common: a case of random weights and log-normal lengths, options, contestants in turn."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIZES = {  # width, layers, heads, key/value heads, feed-forward width, vocabulary
    "1m": (64, 4, 4, 2, 160, 8192),
    "10m": (256, 8, 8, 4, 768, 8192),
    "60m": (512, 12, 8, 4, 1536, 32000),
    "1b": (2048, 16, 32, 8, 8192, 32000),
    "7b": (4096, 32, 32, 8, 14336, 32000),
}


def described(size: str, **more):
    """Returns the specification and the config.json of a model of a size."""
    from scir_jax.world.files import model_config
    from scir_jax.world.spec import WorldSpec

    width, layers, heads, kv_heads, inner, vocabulary = SIZES[size]
    spec = WorldSpec(
        hidden_size=width,
        layers=layers,
        heads=heads,
        key_value_heads=kv_heads,
        head_dim=width // heads,
        intermediate_size=inner,
        **more,
    )
    return spec, {**model_config(spec), "vocab_size": vocabulary}


CONTINUATION = """\
layout: continuation
question: "{words}{{response_b}}"
answer_prefix: ""
verdicts: ["1", "2"]
"""
QUESTION = 75
"""about the tokens of the package's template `continuation` beside the other answer"""


def make_case(directory: Path, size: str, pairs: int, longest: int, question: int = QUESTION) -> None:
    """Writes a random model, its tokenizer and judge templates, and pairs.

    Args:
      question: tokens of the continuing judge's question beside the other answer. The prompt is not repeated in it.
    """
    import jax

    from scir_jax.model import decoder, families
    from scir_jax.model.hf import weights
    from scir_jax.world.files import JUDGE
    from scir_jax.world.tasks import LETTERS
    from scir_jax.world.tokenizer import write_tokenizer

    spec, config = described(size, max_length=8 * longest)
    source = directory / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    write_tokenizer(source, spec.max_length)
    arch = families.read(config, str(source))
    params = jax.tree.map(np.asarray, jax.jit(decoder.define(arch).init)(jax.random.key(0)))
    weights.save(directory / "model", arch, params, config=config, source=source)
    (directory / "judge.yaml").write_text(JUDGE)
    words = "".join(itertools.islice(itertools.cycle(LETTERS), question))
    (directory / "judge_continuation.yaml").write_text(CONTINUATION.format(words=words))
    rng = np.random.default_rng(0)

    def text(mean: float, sigma: float, most: int) -> str:
        tokens = int(np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma), 4, most))
        return "".join(rng.choice(list(LETTERS), tokens))

    with (directory / "pairs.jsonl").open("w") as file:
        for _ in range(pairs):
            row = {"prompt": text(95, 0.7, longest * 2 // 5)}
            row |= {name: text(193, 0.75, longest * 3 // 5) for name in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")


def parsed(parser: argparse.ArgumentParser, contestants: Sequence[str], *, repeat: int) -> argparse.Namespace:
    """Parses the command line with the options that all comparisons have."""
    parser.add_argument("--repeat", type=int, default=repeat, help="repetitions, one contestant after another")
    parser.add_argument("--only", nargs="+", choices=contestants, default=contestants)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    parser.add_argument("--run", choices=contestants, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_figures(arguments: argparse.Namespace, found: dict[str, list[dict]]) -> None:
    """Writes the JSON file where one is asked for."""
    if arguments.output:
        arguments.output.write_text(json.dumps({"settings": vars(arguments), "found": found}, default=str, indent=1))


def alternate(script: str, arguments: argparse.Namespace, directory: str, keys: Sequence[str]) -> dict[str, list[dict]]:
    """Runs the contestants one after another and again, each in a process of its own -> the results of each.

    Args:
      keys: of the arguments that a contestant is told.
    """
    found: dict[str, list[dict]] = {name: [] for name in arguments.only}
    shared = [f"--{key}={getattr(arguments, key)}" for key in keys]
    for number in range(arguments.repeat):
        for name in arguments.only:
            command = [sys.executable, script, "--run", name, "--case", directory, *shared]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name}: ended with code {done.returncode}", file=sys.stderr)
                continue
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{number + 1}/{arguments.repeat} {name}", file=sys.stderr)
    return found
