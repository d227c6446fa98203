"""What tests read of run directories and commands, and what holds of every run's training steps."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

# Tensors of the tiny model.
NORM, HEAD = "model.norm.weight", "lm_head.weight"
# The whole run of fixture `whole`.
ITERATIONS, PROMPTS, RESPONSES, EPOCHS = 2, 8, 3, 2
WHOLE = dict(
    sample=dict(responses=RESPONSES, prompts=PROMPTS, batch_size=4),
    optimise=dict(batch_size=6, epochs=EPOCHS),
    evaluate=dict(grader="scir_jax.world.grader:grade"),
)


# A question of one answer in the words of the tiny world, whose vocabulary has the digits 1 and 2.
POINTWISE = """\
layout: pointwise
question: "verdict {prompt}{response}"
answer_prefix: ""
verdicts: ["1", "2"]
"""


def like_whole(overrides: dict[str, dict]) -> dict[str, dict]:
    """Settings laid over those of the whole run, which has a grader beside them."""
    settings = {name: values for name, values in WHOLE.items() if name != "evaluate"}
    return {name: settings.get(name, {}) | overrides.get(name, {}) for name in settings | overrides}


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def content(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files(directory: Path) -> dict[str, bytes]:
    """All files below a directory but its lock."""
    found = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if name != ".lock"}


def model(run: Path, number: int) -> dict[str, np.ndarray]:
    """What is checkpointed of M_number, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load(run / "checkpoints" / f"M{number}"))
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert one.keys() == other.keys()
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def edit_json(path: Path, **values) -> None:
    changed = {**content(path), **values}
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


def edit_tensors(model: Path, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def refused(done, *words, code=2) -> str:
    """Checks that a command ended with one sentence that holds all words; returns it."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == code, done
    assert len(errors) == 1, done.err
    assert done.err.rstrip().endswith(errors[0].rstrip()), "something follows the sentence"
    assert "Traceback" not in done.err + done.out
    for word in words:
        assert str(word) in errors[0]
    return errors[0]


def asks_judge(config) -> bool:
    """Whether the penalty, the selection or a label that is made anew looks at the judge in every step."""
    preference = config.preference
    dynamic = preference["update"] == "dynamic" and preference["labels"] in ("agreement", "generative", "consensus")
    rule = config.selection["rule"] in ("agreement", "both_orders")
    return bool(config.consistency["weight"]) or rule or dynamic


def check_iterations(run: Path, iterations: int = 1) -> SimpleNamespace:
    """Checks what holds of every run's training steps; returns the first iteration's rows."""
    config = SimpleNamespace(**yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    asked = asks_judge(config)
    rows = lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    steps = [row for row in rows if row["stage"] == "optimise"]
    assert [row["iteration"] for row in steps] == sorted(row["iteration"] for row in steps)
    assert {row["iteration"] for row in steps} == set(range(1, iterations + 1))
    for row in steps:
        # What is a mean over selected pairs is absent where none is selected, and only there.
        absent = {name for name, value in row.items() if value is None}
        if row["selected"]:
            assert not absent
        else:
            assert absent == {"preference"} | {name for name in row if name.startswith(("rewards/", "logps/"))}
        assert row["skipped"] == 0 and row["grad_norm"] > 0 and row["learning_rate"] > 0
        # What only the judge can tell is there where it is asked.
        assert all((name in row) == asked for name in ("consistency", "agreement", "generative/verdict_mass"))
        constructed = row.get("sft/constructed", 0)
        replayed = row.get("sft", 0) - constructed
        terms = config.preference["weight"] * (row["preference"] or 0) + config.replay["weight"] * replayed
        terms += config.consistency["weight"] * row.get("consistency", 0)
        terms += config.judge["constructed_weight"] * constructed
        terms += config.judge["slot_penalty"] * row.get("slot_penalty", 0)
        assert row["loss"] == pytest.approx(terms, abs=1e-5)
        assert row.get("sft", 0) == pytest.approx(row.get("sft/eft", 0) + row.get("sft/ift", 0) + constructed, abs=1e-5)
    for t in range(1, iterations + 1):
        check_iteration(run, t, config, [row for row in steps if row["iteration"] == t], asked)
    assert (run / "summary.json").exists() and (run / "export" / "model.safetensors").exists()
    folder = run / "iteration_01"
    return SimpleNamespace(
        steps=[row for row in steps if row["iteration"] == 1],
        pairs=lines(folder / "pairs.jsonl"),
        decisions=lines(folder / "decisions.jsonl"),
        folder=folder,
    )


def check_iteration(run: Path, t: int, config, steps: list[dict], asked: bool) -> None:
    """Checks pairs, decisions and evaluation of iteration t against each other and against its rows of metrics."""
    folder = run / f"iteration_{t:02d}"
    pairs, decisions = lines(folder / "pairs.jsonl"), lines(folder / "decisions.jsonl")
    assert [pair["pair"] for pair in pairs] == list(range(len(pairs)))
    epochs = [[d["pair"] for d in decisions[i : i + len(pairs)]] for i in range(0, len(decisions), len(pairs))]
    assert len(epochs) == config.optimise["epochs"]
    assert all(sorted(epoch) == list(range(len(pairs))) for epoch in epochs)
    assert [d["step"] for d in decisions] == [1 + i // config.optimise["batch_size"] for i in range(len(decisions))]
    assert [row["stage_step"] for row in steps] == list(range(1, decisions[-1]["step"] + 1))
    for row in steps:
        taken = [d for d in decisions if d["step"] == row["stage_step"]]
        assert row["selected"] == pytest.approx(np.mean([d["selected"] for d in taken]), abs=1e-6)
        if asked:
            assert row["agreement"] == pytest.approx(np.mean([d["agreed"] for d in taken]), abs=1e-6)
    for d in decisions:
        assert ("p_generative" in d) == ("agreed" in d) == asked
        assert len(d.get("p_generative", ())) == (len(config.generative["templates"]) if asked else 0)
        assert all(0 <= p <= 1 for p in (*d.get("p_generative", ()), d["p_implicit"], d["label"]))
        assert d["weight"] == float(d["selected"]) or config.selection["rule"] in ("certainty", "sampled")
    values = content(folder / "evaluation.json")
    assert values["model"] == f"M{t + 1}"
    assert all(math.isfinite(v) for v in values.values() if not isinstance(v, str))
    assert values["selected"] == pytest.approx(np.mean([d["selected"] for d in decisions]))
    assert ("train_agreement" in values) == asked
    # The judge is evaluated whether or not training asks it.
    judged = ("generative_accuracy", "flip_rate", "verdict_mass", "agreement")
    assert all((name in values) == bool(config.data["heldout_pairs"]) for name in judged)
