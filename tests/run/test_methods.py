"""Every method's file in a whole run: what it labels, selects and asks the judge, and labels from elsewhere."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from scir_jax import train
from tests.run.runs import WHOLE, check_iterations, content, lines, logit, model, refused, same

pytestmark = pytest.mark.usefixtures("shared_programs")

METHODS = Path(__file__).parents[2] / "configs" / "methods"
# The logit whose sign is the label, from the frozen logits of the pair and the rewards of the step.
LABELS = {
    "consensus": lambda frozen, generative, implicit: frozen["generative"] + 2 * frozen["likelihood"],
    "consistency_only": lambda frozen, generative, implicit: generative + implicit,
    "implicit": lambda frozen, generative, implicit: frozen["implicit"],
    "scir": lambda frozen, generative, implicit: generative + implicit,
    "selection_only": lambda frozen, generative, implicit: generative + implicit,
    "srlm": lambda frozen, generative, implicit: frozen["generative"],
    "upo": lambda frozen, generative, implicit: frozen["generative"],
}
FROZEN = {
    "consensus": {"generative", "implicit", "likelihood"},
    "implicit": {"implicit"},
    "srlm": {"generative"},
    "upo": {"generative"},
}
# Their steps look at no verdict, so that the judge is not asked in them.
WITHOUT_JUDGE = {"srlm", "implicit", "upo", "cream", "external"}
# Settings of the file that a method is laid over.
BENEATH = {"consistency_only": dict(consistency=dict(kind="js")), "external": dict(replay=dict(weight=0.0))}


def check_judge(method, run, rows):
    """The judge is asked in the steps of those methods that look at it, and evaluated always."""
    asked = method not in WITHOUT_JUDGE
    assert all(("p_generative" in row) == asked for row in rows.decisions)
    assert all(("generative/verdict_mass" in row) == asked for row in rows.steps)
    values = content(run / "iteration_01" / "evaluation.json")
    assert {"generative_accuracy", "flip_rate", "verdict_mass", "slot_bias", "agreement"} <= values.keys()


def certainty(verdicts):
    """1 minus the entropy of the mean prediction plus the mean entropy of the predictions, in bits."""
    p = 1 / (1 + np.exp(-np.array(verdicts)))

    def entropy(p):
        return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))

    return 1 - entropy(p.mean()) + entropy(p).mean()


def test_every_method_is_tried():
    assert {path.stem for path in METHODS.glob("*.yaml")} == {*LABELS, "external", "cream"}


@pytest.mark.slow
@pytest.mark.parametrize("method", LABELS)
def test_methods(method, from_m1, whole):
    run = from_m1("--config", METHODS / f"{method}.yaml", **BENEATH.get(method, {}))
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in yaml.safe_load((METHODS / f"{method}.yaml").read_text()).items():
        assert {key: recorded[section][key] for key in values} == values
    rows = check_iterations(run)
    check_judge(method, run, rows)
    assert not same(model(run, 1), model(run, 2))
    for row in rows.steps:
        assert "sft/eft" in row and (row.get("consistency") or recorded["consistency"]["weight"] == 0)
    for pair in rows.pairs:
        assert pair.get("frozen_logits", {}).keys() == FROZEN.get(method, set())
        assert "label" not in pair and all(len(logits) == 1 for logits in pair.get("frozen_logits", {}).values())
    for row in rows.decisions:
        frozen = {name: logits[0] for name, logits in rows.pairs[row["pair"]].get("frozen_logits", {}).items()}
        generative = logit(row["p_generative"][0]) if "p_generative" in row else None
        expected = LABELS[method](frozen, generative, logit(row["p_implicit"]))
        if recorded["preference"]["soft"]:
            assert row["label"] == pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-5)
        elif abs(expected) > 1e-4:
            assert row["label"] == float(expected > 0)
        assert row["selected"] == (row["agreed"] if recorded["selection"]["rule"] == "agreement" else True)
        if recorded["selection"]["rule"] == "certainty":
            assert row["weight"] == pytest.approx(certainty(rows.pairs[row["pair"]]["verdicts"]), abs=1e-5)


@pytest.mark.slow
def test_external_labels_of_given_pairs(from_m1, whole, world_dir):
    arguments = ("--config", METHODS / "external.yaml", "--data.pairs", world_dir / "eft.jsonl")
    run = from_m1(*arguments, **BENEATH["external"])
    rows = check_iterations(run)
    check_judge("external", run, rows)
    assert not same(model(run, 1), model(run, 2))
    given = lines(world_dir / "eft.jsonl")
    assert [(p["prompt"], p["response_a"], p["response_b"]) for p in rows.pairs] == [
        (g["prompt"], g["chosen"], g["rejected"]) for g in given
    ]
    assert not (rows.folder / "responses.jsonl").exists()
    assert all(p["label"] == 1 and "frozen_logits" not in p for p in rows.pairs)
    assert all(d["label"] == 1 and d["selected"] for d in rows.decisions)
    assert all("sft" not in row for row in rows.steps)
    values = content(run / "iteration_01" / "evaluation.json")  # without a grader and held-out prompts
    assert "generative_accuracy" in values and not {"quality", "length", "label_accuracy"} & values.keys()


@pytest.mark.slow
def test_cream_ranks_responses_with_two_models(from_m1):
    """Best against worst by log pi_1 - log pi_0; the label is the two rankings' agreement, counted pair by pair."""
    run = from_m1("--config", METHODS / "cream.yaml")
    rows = check_iterations(run)
    check_judge("cream", run, rows)
    ours = {}
    for pair in rows.pairs:
        start, implicit = pair["cached"]["start_logps"], pair["cached"]["implicit_logps"]
        reward_a, reward_b = (s - r for s, r in zip(start, implicit, strict=True))
        assert reward_a > reward_b and 0 <= pair["label"] <= 1
        ours.setdefault(pair["prompt"], []).append(pair)
    assert all(len(pairs) == 1 for pairs in ours.values())
    assert len({pair["label"] for pair in rows.pairs}) == 1
    assert all(row["label"] == pytest.approx(rows.pairs[0]["label"]) for row in rows.decisions)


@pytest.mark.slow
def test_external_labels_are_awaited(configure, whole, no_page, command, tmp_path):
    run = tmp_path / "run"
    settings = dict(sample=WHOLE["sample"], optimise=WHOLE["optimise"], **BENEATH["external"])
    file = configure(run, run=dict(start_from=str(whole.path)), data=dict(heldout_prompts=None), **settings)
    call = (train.main, "--config", file, "--config", METHODS / "external.yaml")
    pairs = run / "iteration_01" / "pairs.jsonl"
    for _ in range(2):
        refused(command(*call), pairs, "'label'", "again")
        assert not (run / "checkpoints" / "M2").exists()
    rows = lines(pairs)
    labels = [row["pair"] % 2 for row in rows]
    pairs.write_text("".join(json.dumps({**row, "label": label}) + "\n" for row, label in zip(rows, labels)))
    assert command(*call).code == 0
    found = check_iterations(run)
    assert all(d["label"] == labels[d["pair"]] and d["selected"] for d in found.decisions)
