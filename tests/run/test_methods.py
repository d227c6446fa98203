"""Every method's file in a whole run: what it labels, selects and asks the judge, and labels from elsewhere."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from scir_jax import train
from scir_jax.world.grader import grade
from tests.run.runs import POINTWISE, WHOLE, check_iterations, content, lines, logit, model, refused, same

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
    **{
        f"scir_{name}": lambda frozen, generative, implicit: generative + implicit
        for name in ("both_orders", "constructed", "lagged", "one_order", "transitive")
    },
}
FROZEN = {
    "consensus": {"generative", "implicit", "likelihood"},
    "implicit": {"implicit"},
    "srlm": {"generative"},
    "upo": {"generative"},
    "scir_lagged": {"generative", "generative_before"},
    "scir_transitive": {"generative", "transitive"},
}
# Their steps look at no verdict, so that the judge is not asked in them.
WITHOUT_JUDGE = {"srlm", "srlm_score", "implicit", "upo", "cream", "dice", "external", "oracle"}
# Settings of the file that a method is laid over.
BENEATH = {"consistency_only": dict(consistency=dict(kind="js")), "external": dict(replay=dict(weight=0.0))}


def check_judge(method, run, rows):
    """The judge is asked in the steps of those methods that look at it, and evaluated always."""
    asked = method not in WITHOUT_JUDGE
    assert all(("p_generative" in row) == asked for row in rows.decisions)
    assert all(("generative/verdict_mass" in row) == asked for row in rows.steps)
    spent = content(run / "iteration_01" / "costs.json")
    assert (spent["optimise"]["trained_judge"] > 0) == (asked or method == "scir_constructed")
    values = content(run / "iteration_01" / "evaluation.json")
    assert {"generative_accuracy", "flip_rate", "verdict_mass", "slot_bias", "agreement"} <= values.keys()


def test_every_method_is_tried():
    others = {"external", "cream", "dice", "oracle", "upo_dropout", "srlm_score"}
    assert {path.stem for path in METHODS.glob("*.yaml")} == {*LABELS, *others}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pytest.param("scir", marks=pytest.mark.documented("train")),
        pytest.param("srlm", marks=pytest.mark.documented("train methods/srlm")),
        *(method for method in LABELS if method not in ("scir", "srlm")),
    ],
)
def test_methods(method, documented, small_quickstart, from_m1, whole):
    if documented:
        run = small_quickstart(*documented)
    else:
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
    if method == "scir_constructed":
        check_constructed(run, rows)
    if method == "scir_one_order":
        judged = content(whole.path / "iteration_01" / "costs.json")["optimise"]["trained_judge"]
        spent = content(run / "iteration_01" / "costs.json")["optimise"]["trained_judge"]
        assert 0.4 < spent / judged < 0.6, "a question of two, and what the two share"
        assert not any("generative/slot_bias" in row for row in rows.steps)
    if method == "scir_both_orders":
        assert all(row["slot_penalty"] >= 0 for row in rows.steps)
        assert sum(row["selected"] for row in rows.decisions) < sum(row["agreed"] for row in rows.decisions)
    for row in rows.decisions:
        frozen = {name: logits[0] for name, logits in rows.pairs[row["pair"]].get("frozen_logits", {}).items()}
        generative = logit(row["p_generative"][0]) if "p_generative" in row else None
        expected = LABELS[method](frozen, generative, logit(row["p_implicit"]))
        if recorded["preference"]["soft"]:
            assert row["label"] == pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-5)
        elif abs(expected) > 1e-4:
            assert row["label"] == float(expected > 0)
        rule, pair = recorded["selection"]["rule"], rows.pairs[row["pair"]]
        if rule == "both_orders":
            assert row["agreed"] or not row["selected"]
        else:
            assert row["selected"] == (row["agreed"] if rule == "agreement" else True)
        if rule == "sampled":
            assert row["weight"] == pair["weight"] == int(pair["weight"]) >= 1
            votes = np.sign(pair["verdicts"]).sum()
            assert votes == 0 or (votes > 0) == (row["label"] > 0.5)


def check_constructed(run, rows):
    """The pairs of known order teach the judge in every step, and a run leaves and keeps their file."""
    pairs = lines(rows.folder / "constructed.jsonl")
    assert {pair["construction"] for pair in pairs} == {"perturbed", "truncated"}
    assert all(0 < row["sft/constructed"] < 5 for row in rows.steps)
    assert "iteration_01/constructed.jsonl" in content(run / "files.json")
    assert "construct" in content(rows.folder / "seconds.json")


@pytest.mark.slow
def test_points_of_answers_alone(from_m1, whole, tmp_path):
    """The best against the worst answer by the points that the judge gives each, which cost no judge in a step."""
    template = tmp_path / "points.yaml"
    template.write_text(POINTWISE)
    run = from_m1("--config", METHODS / "srlm_score.yaml", "--generative.pointwise", template)
    rows = check_iterations(run)
    check_judge("srlm_score", run, rows)
    answers = {}
    for row in lines(rows.folder / "responses.jsonl"):
        answers.setdefault(row["prompt"], set()).add(tuple(row["response_ids"]))
    assert len(rows.pairs) == sum(len(found) > 1 for found in answers.values())
    for pair in rows.pairs:
        better, worse = pair["cached"]["start_points"]
        assert 1 < min(better, worse) and max(better, worse) < 2
        assert all(0 < mass < 1 for mass in pair["cached"]["start_points_mass"])
        assert pair["frozen_logits"].keys() == {"pointwise"}
        assert pair["frozen_logits"]["pointwise"][0] == pytest.approx(better - worse, abs=1e-6)
    for row in rows.decisions:
        first, second = rows.pairs[row["pair"]]["cached"]["start_points"]
        assert row["label"] == (first > second) and logit(row["p_pointwise"]) == pytest.approx(first - second, abs=1e-4)
    assert not same(model(run, 1), model(run, 2))
    values = content(run / "iteration_01" / "evaluation.json")
    assert 0 <= values["pointwise_accuracy"] <= 1 and 0 < values["points_mass"] < 1
    scored = content(rows.folder / "costs.json")["score"]
    # No verdict on a pair was asked for: every question shows one answer.
    assert 0 < scored["judged"] < scored["scored"]


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
@pytest.mark.documented("train methods/dice")
def test_dice_mixes_labelled_pairs_in(documented, small_quickstart, world_dir):
    """Half of the pairs are those of data.eft with their own labels, of other prompts; the others are chosen by DICE."""
    run = small_quickstart(*documented)
    rows = check_iterations(run)
    check_judge("dice", run, rows)
    sampled = {row["prompt"] for row in lines(rows.folder / "responses.jsonl")}
    given = {(row["prompt"], row["chosen"], row["rejected"]) for row in lines(world_dir / "eft.jsonl")}
    ours = [pair for pair in rows.pairs if pair["prompt"] in sampled]
    offline = rows.pairs[len(ours) :]
    assert len(offline) == len(ours) > 3 and all(pair["label"] == 1 for pair in rows.pairs)
    assert all((pair["prompt"], pair["response_a"], pair["response_b"]) in given for pair in offline)
    assert not sampled & {pair["prompt"] for pair in offline}
    assert all(d["label"] == 1 and d["selected"] for d in rows.decisions)


@pytest.mark.slow
def test_the_teacher_lags_by_one_model(from_m1, tmp_path):
    """M1 is its own teacher. What the second iteration's pairs say of M1 is what a run says that starts with them."""
    lagged = ("--config", METHODS / "scir_lagged.yaml")
    run = from_m1(*lagged, run=dict(iterations=2)).rename(tmp_path / "first")
    first, second = (lines(run / f"iteration_0{t}" / "pairs.jsonl") for t in (1, 2))
    assert all(pair["frozen_logits"]["generative_before"] == pair["frozen_logits"]["generative"] for pair in first)
    assert all(pair["frozen_logits"]["generative_before"] != pair["frozen_logits"]["generative"] for pair in second)
    again = from_m1(*lagged, data=dict(pairs=str(run / "iteration_02" / "pairs.jsonl")))
    rows = lines(again / "iteration_01" / "pairs.jsonl")
    for ours, pair in zip(rows, second, strict=True):
        expected = pair["frozen_logits"]["generative_before"]
        assert ours["frozen_logits"]["generative"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_oracle_labels_are_the_graders(from_m1):
    run = from_m1("--config", METHODS / "oracle.yaml")
    rows = check_iterations(run)
    check_judge("oracle", run, rows)
    for pair in rows.pairs:
        a, b = (grade(pair["prompt"], pair[f"response_{side}"])["quality"] for side in "ab")
        assert pair["label"] == (0.5 if a == b else float(a > b))


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
