"""Scoring side by side: the log-probabilities of answers by a torch loop and by scir_jax, on the same model and rows.

    python benchmarks/score.py --size 1m --prompts 64 --responses 4

scir_jax scores answers alone, and together behind their prompt, whose tokens it then computes once (`shared`). The torch
loop takes rows of about one length together, and the head at answers only. Every contestant runs in a process of its
own; programs are compiled before. One row per contestant and repetition; `total` is the sum of all log-probabilities, so
that equal work is shown to be equal. Needs the extra [test], for torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from comparison import SIZES, alternate, make_case, parsed, write_figures

CONTESTANTS = ("torch", "alone", "shared")
KEYS = ("size", "prompts", "responses", "batch", "longest", "dtype")


def prepared(directory: Path, arguments: argparse.Namespace, share: str):
    """Reads the case -> (setup, answers to score with their prompts)."""
    from scir_jax.config.schema import (
        Config,
        DataConfig,
        EvaluateConfig,
        GenerativeConfig,
        ModelConfig,
        PairsConfig,
        SampleConfig,
        TextConfig,
    )
    from scir_jax.run.setup import prepare

    config = Config(
        model=ModelConfig(path=str(directory / "model"), dtype=arguments.dtype),
        data=DataConfig(prompts=str(directory / "pairs.jsonl"), heldout_pairs=str(directory / "pairs.jsonl")),
        text=TextConfig(
            max_prompt_tokens=arguments.longest * 2 // 5 + 8,
            max_response_tokens=arguments.longest * 3 // 5 + 8,
            share_prompts=share,
        ),
        sample=SampleConfig(responses=arguments.responses),
        pairs=PairsConfig(kind="all"),
        generative=GenerativeConfig(templates=()),
        evaluate=EvaluateConfig(batch_size=arguments.batch),
    )
    setup = prepare(config)
    pairs = setup.inputs.heldout_pairs
    answers = [answer for pair in pairs for answer in pair.answers]
    prompts = [pair.prompt for pair in pairs][: arguments.prompts]
    count = arguments.responses
    return setup, [(prompts[i // count], answers[i % len(answers)]) for i in range(len(prompts) * count)]


def run_jax(directory: Path, arguments: argparse.Namespace, share: str) -> dict:
    """Scores with scir_jax."""
    from scir_jax.run import scoring

    setup, items = prepared(directory, arguments, share)
    params, seconds, spent = setup.parameters.configured(), [], []
    for _ in range(3):
        spent.clear()
        started = time.monotonic()
        logps = scoring.score_answers(setup.encoder, setup.programs, params, items, spend=spent.append)["logps"]
        seconds.append(time.monotonic() - started)
    # The first time compiles.
    return {"seconds": min(seconds[1:]), "answers": len(items), "tokens": spent[0].scored, "total": float(logps.sum())}


def run_torch(directory: Path, arguments: argparse.Namespace) -> dict:
    """Scores with transformers, rows sorted by length and padded to the longest of their batch."""
    import torch
    import transformers

    setup, items = prepared(directory, arguments, "never")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32).eval()
    rows = sorted((setup.encoder.scored_row(*item) for item in items), key=lambda row: len(row.ids))
    started, total, size = time.monotonic(), 0.0, 2 * arguments.batch
    with torch.no_grad():
        for part in (rows[first : first + size] for first in range(0, len(rows), size)):
            ids = torch.zeros((len(part), max(len(row.ids) for row in part)), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(part):
                ids[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.ids), 1
            hidden = model.model(ids, attention_mask=mask).last_hidden_state
            before = torch.cat([hidden[i, row.start - 1 : len(row.ids) - 1] for i, row in enumerate(part)])
            targets = torch.cat([ids[i, row.start : len(row.ids)] for i, row in enumerate(part)])
            found = torch.log_softmax(model.lm_head(before), dim=-1).gather(1, targets[:, None])
            total += float(found.double().sum())
    tokens = sum(len(row.ids) for row in rows)
    return {"seconds": time.monotonic() - started, "answers": len(rows), "tokens": tokens, "total": total}


def main() -> int:
    """Runs the contestants and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1m", help="of the model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--responses", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--batch", type=int, default=8, help="evaluate.batch_size, pairs; twice as many rows")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest prompt and answer together")
    parser.add_argument("--dtype", default="float32", help="that scir_jax computes in")
    arguments = parsed(parser, CONTESTANTS, repeat=1)
    if arguments.run:
        if arguments.run == "torch":
            result = run_torch(arguments.case, arguments)
        else:
            share = {"alone": "never", "shared": "always"}[arguments.run]
            result = run_jax(arguments.case, arguments, share)
        print(json.dumps(result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        make_case(Path(directory), arguments.size, arguments.prompts, arguments.longest)
        found = alternate(__file__, arguments, directory, KEYS)
    print(f"{'contestant':<12}{'seconds':>9}{'answers':>9}{'answers/s':>11}{'tokens':>9}{'peak GiB':>10}{'total':>16}")
    for name, results in found.items():
        for one in results:
            print(
                f"{name:<12}{one['seconds']:>9.2f}{one['answers']:>9}{one['answers'] / one['seconds']:>11.1f}"
                f"{one['tokens']:>9,}{one['peak_gib']:>10.2f}{one['total']:>16,.2f}"
            )
    write_figures(arguments, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
