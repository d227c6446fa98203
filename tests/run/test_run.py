"""A whole run of a tiny world in this process: what its files hold, and what commands make of it."""

import hashlib
import itertools
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import scir_jax
from scir_jax import evaluate, train
from scir_jax.config.checks import resolve
from scir_jax.config.files import to_dict
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.report import page as report
from scir_jax.run import directory, scoring
from scir_jax.run.setup import prepare
from scir_jax.world.grader import grade
from tests.run.runs import ITERATIONS, PROMPTS, RESPONSES, check_iterations, content, files, lines, logit, refused

pytestmark = pytest.mark.usefixtures("shared_programs")


def test_files_of_a_run(whole):
    names = {p.name for p in whole.path.iterdir()} - {".lock"}
    folders = {f"iteration_{t:02d}" for t in range(ITERATIONS + 1)}
    single = {"config.yaml", "files.json", "manifest.json", "metrics.jsonl", "data.json", "summary.json", "report.html"}
    assert names == single | folders | {"checkpoints", "export", "tensorboard"}
    models = {f"M{n}" for n in range(ITERATIONS + 2)}
    assert {p.name for p in (whole.path / "checkpoints").iterdir()} == models | {"arrays.json"}
    evaluated = {"evaluation.json", "heldout_responses.jsonl", "costs.json", "seconds.json", "memory.json"}
    made = {"responses.jsonl", "pairs.jsonl", "decisions.jsonl"}
    for t in range(ITERATIONS + 1):
        assert {p.name for p in (whole.path / f"iteration_{t:02d}").iterdir()} == evaluated | (made if t else set())
    assert list((whole.path / "tensorboard").glob("events.*"))
    assert yaml.safe_load((whole.path / "config.yaml").read_text()) == to_dict(whole.config)


def test_metrics_hold_each_step_once(whole):
    check_iterations(whole.path, ITERATIONS)
    rows = lines(whole.path / "metrics.jsonl")
    stages = [
        (stage, iteration) for (stage, iteration), _ in itertools.groupby(rows, lambda r: (r["stage"], r["iteration"]))
    ]
    assert stages == [("sft", 0), ("optimise", 1), ("optimise", 2)]
    sft = [row for row in rows if row["stage"] == "sft"]
    assert [row["stage_step"] for row in sft] == [1, 2, 3]  # 24 conversations, 24 judge questions, 8 of each a step
    for row in sft:
        assert row["loss"] == pytest.approx(row["sft/ift"] + row["sft/eft"], abs=1e-5)
    assert all(row[name] > 0 for row in rows for name in ("seconds", "tokens_per_second", "teraflops"))


def test_the_first_steps_preference_loss_is_ln_2(whole):
    for t in range(1, ITERATIONS + 1):
        rows = [
            row for row in lines(whole.path / "metrics.jsonl") if (row["stage"], row["iteration"]) == ("optimise", t)
        ]
        assert rows[0]["selected"] > 0
        assert rows[0]["preference"] == pytest.approx(math.log(2), abs=1e-5)
        assert any(abs(row["preference"] - math.log(2)) > 1e-4 for row in rows[1:] if row["preference"] is not None)


def test_responses_and_pairs(whole, world_dir):
    prompts = [row["prompt"] for row in lines(world_dir / "prompts.jsonl")]
    used = []
    for t in range(1, ITERATIONS + 1):
        responses = lines(whole.path / f"iteration_{t:02d}" / "responses.jsonl")
        numbers = list(dict.fromkeys(row["prompt_number"] for row in responses))
        used += numbers
        assert [(r["prompt_number"], r["sample"]) for r in responses] == list(
            itertools.product(numbers, range(RESPONSES))
        )
        assert len(numbers) == PROMPTS
        for row in responses:
            assert row["prompt"] == prompts[row["prompt_number"]]
            assert 1 <= len(row["response_ids"]) <= 12 and row["logprob"] < 0
            assert row["stop"] == "eos" or len(row["response_ids"]) == 12
        sampled = {(row["prompt"], tuple(row["response_ids"])): row for row in responses}
        pairs = lines(whole.path / f"iteration_{t:02d}" / "pairs.jsonl")
        seen = set()
        for pair in pairs:
            sides = [tuple(pair[f"response_{side}_ids"]) for side in "ab"]
            assert sides[0] != sides[1]
            seen.add((pair["prompt"], frozenset(sides)))
            for i, (side, ids) in enumerate(zip("ab", sides)):
                row = sampled[pair["prompt"], ids]
                assert pair[f"response_{side}"] == row["response"] and pair[f"length_{side}"] == len(ids)
                # Sampled at temperature 1: the sampler's log-probability is the policy's own.
                assert pair["cached"]["start_logps"][i] == pytest.approx(row["logprob"], abs=1e-4)
                assert pair[f"quote_{side}_ids"] == row["quote_ids"]
            assert not {"label", "frozen_logits", "verdicts"} & pair.keys()
            assert pair["length_penalty"] == 0 and pair["weight"] == 1
        assert len(seen) == len(pairs)
        for prompt in {row["prompt"] for row in responses}:
            distinct = len({ids for p, ids in sampled if p == prompt})
            assert sum(pair["prompt"] == prompt for pair in pairs) == min(math.comb(distinct, 2), 2)
    assert len(set(used)) == len(used)  # consecutive parts of one permutation


def test_cached_log_probabilities_are_those_of_the_models(whole):
    encoder, _, programs, _ = prepare(resolve(whole.config))
    store = ModelStore(whole.path / "checkpoints")
    for t in range(1, ITERATIONS + 1):
        pairs = lines(whole.path / f"iteration_{t:02d}" / "pairs.jsonl")
        items = [
            (encoder.prompt(pair["messages"]), encoder.sampled(pair[f"response_{side}_ids"]))
            for pair in pairs
            for side in "ab"
        ]
        start, lagging = (
            scoring.score_answers(encoder, programs, store.load(n, programs.abstract_trained), items)["logps"]
            for n in (t, t - 1)
        )
        for role, expected in (("start", start), ("preference", start), ("implicit", lagging)):
            cached = [pair["cached"][f"{role}_logps"] for pair in pairs]
            np.testing.assert_allclose(cached, expected.reshape(-1, 2), atol=1e-4)
        assert np.abs(start - lagging).max() > 1e-3


def test_decisions_follow_from_the_rewards(whole):
    for t in range(1, ITERATIONS + 1):
        for row in lines(whole.path / f"iteration_{t:02d}" / "decisions.jsonl"):
            (generative,), implicit = row["p_generative"], row["p_implicit"]
            assert row["agreed"] == ((generative > 0.5) == (implicit > 0.5))
            assert row["selected"] == row["agreed"]
            if abs(logit(generative) + logit(implicit)) > 1e-4:
                assert row["label"] == float(logit(generative) + logit(implicit) > 0)


def test_evaluations_and_summary(whole, world_dir):
    rows = content(whole.path / "summary.json")["rows"]
    assert [row["model"] for row in rows] == [f"M{n}" for n in range(1, ITERATIONS + 2)]
    heldout = [row["prompt"] for row in lines(world_dir / "heldout_prompts.jsonl")]
    answers = [lines(whole.path / f"iteration_{t:02d}" / "heldout_responses.jsonl") for t in range(ITERATIONS + 1)]
    for t, row in enumerate(rows):
        folder = whole.path / f"iteration_{t:02d}"
        values, seconds = content(folder / "evaluation.json"), content(folder / "seconds.json")
        assert row == {**values, "seconds": round(sum(seconds.values()), 1)}
        assert list(seconds) == (["sample", "score", "optimise", "evaluate"] if t else ["start", "sft", "evaluate"])
        sampled, greedy = ([r for r in answers[t] if r["greedy"] == kind] for kind in (False, True))
        assert [r["prompt"] for r in sampled] == [r["prompt"] for r in greedy] == heldout
        for name, part in (("quality", sampled), ("greedy_quality", greedy)):
            assert values[name] == pytest.approx(np.mean([grade(r["prompt"], r["response"])["quality"] for r in part]))
        assert values["length"] == pytest.approx(np.mean([len(r["response_ids"]) for r in sampled]))
        assert values["distinct"] == 1  # of one sample a prompt
        for name in ("generative_accuracy", "implicit_accuracy", "agreement", "flip_rate", "verdict_mass", "eos_rate"):
            assert 0 <= values[name] <= 1
        assert ("win_rate" in values) == ("selected" in values) == bool(t)
        if t:
            ours, theirs = (
                [grade(r["prompt"], r["response"])["quality"] for r in a if not r["greedy"]]
                for a in (answers[t], answers[0])
            )
            wins = [0.5 if x == y else float(x > y) for x, y in zip(ours, theirs, strict=True)]
            assert values["win_rate"] == pytest.approx(np.mean(wins))


def test_manifest_hashes_what_the_run_read(whole, world_dir):
    manifest = content(whole.path / "manifest.json")

    def sha256(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    hashes = manifest["sha256"]
    for key in ("prompts", "ift", "eft", "heldout_prompts", "heldout_pairs"):
        assert hashes.pop(f"data.{key}") == sha256(world_dir / f"{key}.jsonl")
    templates = {k: hashes.pop(k) for k in list(hashes) if k.startswith("generative.templates/")}
    assert list(templates) == ["generative.templates/1 judge"]
    assert {"model.path/model.safetensors", "model.path/config.json", "model.path/tokenizer.json"} <= hashes.keys()
    for name, value in hashes.items():
        assert value == sha256(world_dir / "model" / name.removeprefix("model.path/"))
    assert manifest["templates"].keys() == {f"{world_dir}/judge.yaml"}
    assert manifest["layout"] == directory.LAYOUT and manifest["iterations"] == ITERATIONS
    assert manifest["seed"] == 0 and {"python", "jax", "scir_jax"} <= manifest["versions"].keys()


def test_the_export_is_the_last_model(whole):
    programs = prepare(resolve(whole.config)).programs
    params = ModelStore(whole.path / "checkpoints").load(ITERATIONS + 1, programs.abstract_trained)
    rows = lines(whole.path / "iteration_02" / "responses.jsonl")
    network = AutoModelForCausalLM.from_pretrained(whole.path / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole.path / "export")
    longest = max(rows, key=lambda row: len(row["response_ids"]))
    ids = longest["prompt_ids"] + longest["response_ids"]
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0].numpy()
    ours = programs.model
    logits = jax.jit(lambda params, ids: ours.logits(params, ours.hidden(params, ids)))
    found = logits(params, np.array([ids], np.int32))
    np.testing.assert_allclose(found[0], expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected).max() > 1
    prompt = tokenizer.apply_chat_template(longest["messages"], add_generation_prompt=True, return_dict=False)
    assert prompt == longest["prompt_ids"]


def test_the_same_command_again_only_prints(whole, command):
    done = command(train.main, "--config", whole.file)
    assert done.code == 0
    assert all(re.search(rf"\bM{n}\b", done.out) for n in range(1, ITERATIONS + 2))
    after = files(whole.path)
    assert after.keys() == whole.files.keys()
    assert [name for name in after if after[name] != whole.files[name]] == []


def test_another_configuration_is_refused(whole, command):
    done = command(train.main, "--config", whole.file, "--optimise.learning_rate", 0.25, "--run.seed", 7)
    differ = "optimise.learning_rate (0.001 there, 0.25 here)", "run.seed (0 there, 7 here)"
    message = refused(done, "another configuration", *differ)
    assert message.count(" there, ") == 2
    assert files(whole.path) == whole.files


def test_programs_compile_once(whole):
    """Of a trainer its step and the making of its state; samplers of one and of several answers to a prompt."""
    once = {"scorer": [1], "judge": [1], "sft": [1, 1], "optimise": [1, 1], "sampler": [1, 1]}
    assert whole.compiled == once and RESPONSES != 1


def test_evaluate_prints_and_repeats_evaluations(copied, whole, command):
    before = files(copied)
    done = command(evaluate.main, "--run", copied)
    assert done.code == 0 and all(re.search(rf"\bM{n}\b", done.out) for n in range(1, ITERATIONS + 2))
    assert files(copied) == before
    numbers = [content(copied / f"iteration_{t:02d}" / "evaluation.json") for t in range(ITERATIONS + 1)]
    for row in numbers:
        assert f"{row['quality']:.3f}" in done.out and f"{row['generative_accuracy']:.3f}" in done.out
    for t in range(ITERATIONS + 1):
        (copied / f"iteration_{t:02d}" / "evaluation.json").unlink()
    again = command(evaluate.main, "--run", copied, "--again", "true")
    assert again.code == 0, again.err
    for t, row in enumerate(numbers):
        assert content(copied / f"iteration_{t:02d}" / "evaluation.json") == row
    after = files(copied)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []


def test_report_writes_the_page_again(copied, capsys):
    page = copied / "report.html"
    page.unlink()
    assert report.main([str(copied)]) == 0
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.lstrip().lower().startswith("<!doctype html") and "</html>" in text
    assert all(f"M{n}" in text for n in range(1, ITERATIONS + 2))


def test_entropy_and_divergence_from_m1(whole):
    run = scir_jax.Run(whole.path)
    for t in range(ITERATIONS + 1):
        folder = whole.path / f"iteration_{t:02d}"
        values = content(folder / "evaluation.json")
        rows = [row for row in lines(folder / "heldout_responses.jsonl") if not row["greedy"]]
        ids = [row["response_ids"] for row in rows]
        scored = {
            name: np.array([run.models[name].logprobs(row["messages"], [row["response_ids"]])[0] for row in rows])
            for name in {"M1", f"M{t + 1}"}
        }
        ours = scored[f"M{t + 1}"]
        assert values["entropy"] == pytest.approx(-ours.sum() / sum(map(len, ids)), abs=1e-4)
        if t:
            assert values["kl"] == pytest.approx((ours - scored["M1"]).mean(), abs=1e-3) and values["kl"] != 0
        else:
            assert "kl" not in values
        for name in ("generative", "implicit"):
            if f"{name}_accuracy" in values:
                assert {f"{name}_{key}" for key in ("ties", "ece", "brier")} <= set(values)
