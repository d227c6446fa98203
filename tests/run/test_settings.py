"""Settings in whole runs, several a run, and runs without some of their files."""

import math
import re

import pytest

from scir_jax import train
from tests.run.runs import check_iterations, content, lines, model, same

pytestmark = pytest.mark.usefixtures("shared_programs")

# Each value of a setting at least once, several settings a run. {0} stands for the world's directory.
STANDALONE, CONTINUATION = "{0}/judge.yaml", "{0}/judge_continuation.yaml"
SETTINGS = {
    "continuation, agreement, ipo, all pairs, mean, sft": dict(
        run=dict(iterations=2),
        generative=dict(templates=(CONTINUATION,)),
        consistency=dict(kind="agreement", weight=0.5, stop_gradient="implicit"),
        preference=dict(loss="ipo", reference="sft", labels="likelihood", soft=True),
        sample=dict(prompts=4, top_p=0.95, top_k=20, temperature=0.9),
        pairs=dict(kind="all"),
        implicit=dict(length="mean", reference="sft"),
    ),
    "two templates, cross-entropy, hinge, random pairs, penalty, base, two micro-batches": dict(
        generative=dict(templates=(CONTINUATION, STANDALONE)),
        consistency=dict(kind="cross_entropy"),
        preference=dict(loss="hinge", labels="generative"),
        pairs=dict(kind="random", per_prompt=1),
        implicit=dict(length="penalty", reference="base"),
        training=dict(accumulate=2, weight_decay=0.1, schedule="linear"),
    ),
    "likelihood, pseudo-label, sigmoid, best and worst, penalty, previous, frozen, remat": dict(
        rewards=dict(models=("implicit", "likelihood", "generative"), likelihood_length="mean"),
        consistency=dict(kind="pseudo_label", stop_gradient="generative", sharpen=0.7),
        preference=dict(
            loss="sigmoid", reference="base", length_normalised=True, update="frozen", weight=2.0, label_smoothing=0.1
        ),
        selection=dict(confidence=0.01),
        pairs=dict(kind="best_worst", likelihood_weight=0.5),
        implicit=dict(length="penalty", reference="previous"),
        training=dict(schedule="constant"),
        replay=dict(ift_batch_size=4, weight=0.5),
        model=dict(remat="dots"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, from_m1, world_dir, whole):
    settings = {section: dict(values) for section, values in SETTINGS[name].items()}
    if "generative" in settings:
        settings["generative"]["templates"] = tuple(t.format(world_dir) for t in settings["generative"]["templates"])
    run = from_m1(**settings)
    iterations = settings.get("run", {}).get("iterations", 1)
    rows = check_iterations(run, iterations)
    assert not same(model(run, 1), model(run, 2))

    by_prompt = {}
    for row in lines(rows.folder / "responses.jsonl"):
        by_prompt.setdefault(row["prompt"], set()).add(tuple(row["response_ids"]))
    kind = settings["pairs"]["kind"]
    for prompt, distinct in by_prompt.items():
        pairs = [
            frozenset(tuple(pair[f"response_{side}_ids"]) for side in "ab")
            for pair in rows.pairs
            if pair["prompt"] == prompt
        ]
        assert len(set(pairs)) == len(pairs) and all(len(pair) == 2 and pair <= distinct for pair in pairs)
        possible = math.comb(len(distinct), 2)
        if kind == "all":
            assert len(pairs) == possible
        elif kind == "random":
            assert len(pairs) == min(possible, 1)
        elif kind == "best_worst":
            assert len(pairs) == min(2, len(distinct) - 1)
            assert not pairs or frozenset.intersection(*pairs)  # the best is in all of them
    penalty = settings["implicit"]["length"] == "penalty"
    assert len({pair["length_penalty"] for pair in rows.pairs}) == 1
    assert rows.pairs[0]["length_penalty"] >= 0 and (penalty or rows.pairs[0]["length_penalty"] == 0)
    assert all(("sft/ift" in row) == (settings.get("replay", {}).get("ift_batch_size", 0) > 0) for row in rows.steps)


# --- parts left out -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_examples_held_out_files_and_grader(configure, tmp_path, command):
    """M1 is M0 to the bit, there is no replay, and the evaluation holds what training itself tells."""
    run = tmp_path / "run"
    absent = dict.fromkeys(("ift", "eft", "heldout_prompts", "heldout_pairs"))
    done = command(train.main, "--config", configure(run, data=absent))
    assert done.code == 0, done.err
    assert same(model(run, 0), model(run, 1)) and not same(model(run, 1), model(run, 2))
    rows = check_iterations(run)
    assert all("sft" not in row for row in rows.steps)
    assert content(run / "iteration_00" / "evaluation.json") == {"model": "M1"}
    assert content(run / "iteration_01" / "evaluation.json").keys() == {"model", "selected", "train_agreement"}
    assert not list(run.glob("iteration_*/heldout_responses.jsonl"))
    # M1 is its own reference.
    for pair in rows.pairs:
        assert pair["cached"]["start_logps"] == pair["cached"]["implicit_logps"]
    assert re.search(r"\bM2\b", done.out) and "quality" not in done.out
    assert (run / "report.html").exists()
