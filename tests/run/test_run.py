"""Whole runs of a tiny world in this process: their files, every method, settings in pairs, parts left out."""

import hashlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from orbax.checkpoint import v1 as ocp

from scir_jax import evaluate, train
from scir_jax.config import cli
from scir_jax.config.files import to_dict, to_yaml
from scir_jax.report import page as report
from scir_jax.engine.checkpoint import ModelStore
from scir_jax.run.metrics import Metrics
from scir_jax.run import console, scoring
from scir_jax.run.directory import RunDirectory
from scir_jax.run.export import export_model
from scir_jax.run.iteration import Run
from scir_jax.run.session import Session
from scir_jax.world.grader import grade

pytestmark = pytest.mark.usefixtures("cheap_compilation")

METHODS = Path(__file__).parents[2] / "configs" / "methods"
ITERATIONS, PROMPTS, RESPONSES, EPOCHS = 2, 8, 3, 2
WHOLE = dict(
    sample=dict(responses=RESPONSES, prompts=PROMPTS, batch_size=4),
    optimise=dict(batch_size=6, epochs=EPOCHS),
    evaluate=dict(grader="scir_jax.world.grader:grade"),
)


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]


def content(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files(directory: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if name != ".lock"}


def model(run: Path, number: int) -> dict[str, np.ndarray]:
    """The parameters of M_number by name."""
    leaves = jax.tree_util.tree_flatten_with_path(ocp.load(run / "checkpoints" / f"M{number}"))[0]
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert one.keys() == other.keys()
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.fixture(scope="module")
def configure(tiny_config, world_dir):
    """configure(directory, **overrides) -> YAML file of a run in `directory`, without building a world."""

    def write(directory: Path, **overrides) -> Path:
        run = dict(directory=str(directory), **overrides.pop("run", {}))
        config = tiny_config(world_dir, run=run, world=dict(directory=None), **overrides)
        file = directory.with_name(directory.name + ".yaml")
        file.write_text(to_yaml(config), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="module")
def whole(configure, cheap_compilation, tmp_path_factory):
    """A finished run. Read only."""
    path = tmp_path_factory.mktemp("whole") / "run"
    file = configure(path, run=dict(iterations=ITERATIONS, tensorboard=True), **WHOLE)
    assert train.main(["--config", str(file)]) == 0
    config, _ = cli.parse("train", "", ["--config", str(file)])
    return SimpleNamespace(path=path, file=file, config=config, files=files(path))


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the finished run to change."""
    return Path(shutil.copytree(whole.path, tmp_path / "copied"))


@pytest.fixture
def no_page(monkeypatch):
    """Runs leave out the report, whose figures take longer than a tiny run."""
    monkeypatch.setattr(report, "write_report", lambda path: path / "report.html")


@pytest.fixture
def from_m1(configure, whole, no_page, tmp_path):
    """from_m1(*arguments, **overrides) -> the finished directory of a run from the whole run's M1.

    Its shapes are those of the whole run unless something else is said, so that programs are compiled once.
    """

    def run(*arguments, **overrides):
        settings = {section: dict(values) for section, values in WHOLE.items()}
        del settings["evaluate"]
        for section, values in overrides.items():
            settings[section] = settings.get(section, {}) | values
        settings["run"] = dict(start_from=str(whole.path), **overrides.get("run", {}))
        settings["data"] = dict(heldout_prompts=None, **overrides.get("data", {}))
        file = configure(tmp_path / "run", **settings)
        assert train.main(["--config", str(file), *map(str, arguments)]) == 0
        return tmp_path / "run"

    return run


def check_iterations(run: Path, iterations: int = 1) -> SimpleNamespace:
    """Checks what holds of every run's training steps; returns the first iteration's rows."""
    config = SimpleNamespace(**yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
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
        terms = config.preference["weight"] * (row["preference"] or 0)
        terms += config.consistency["weight"] * row["consistency"] + config.replay["weight"] * row.get("sft", 0)
        assert row["loss"] == pytest.approx(terms, abs=1e-5)
        assert row.get("sft", 0) == pytest.approx(row.get("sft/eft", 0) + row.get("sft/ift", 0), abs=1e-5)
    for t in range(1, iterations + 1):
        folder = run / f"iteration_{t:02d}"
        pairs, decisions = lines(folder / "pairs.jsonl"), lines(folder / "decisions.jsonl")
        assert [pair["pair"] for pair in pairs] == list(range(len(pairs)))
        epochs = [[d["pair"] for d in decisions[i : i + len(pairs)]] for i in range(0, len(decisions), len(pairs))]
        assert len(epochs) == config.optimise["epochs"]
        assert all(sorted(epoch) == list(range(len(pairs))) for epoch in epochs)
        assert [d["step"] for d in decisions] == [1 + i // config.optimise["batch_size"] for i in range(len(decisions))]
        mine = [row for row in steps if row["iteration"] == t]
        assert [row["stage_step"] for row in mine] == list(range(1, decisions[-1]["step"] + 1))
        for row in mine:
            taken = [d for d in decisions if d["step"] == row["stage_step"]]
            assert row["selected"] == pytest.approx(np.mean([d["selected"] for d in taken]), abs=1e-6)
            assert row["agreement"] == pytest.approx(np.mean([d["agreed"] for d in taken]), abs=1e-6)
        templates = len(config.generative["templates"])
        for d in decisions:
            assert len(d["p_generative"]) == templates
            assert all(0 <= p <= 1 for p in (*d["p_generative"], d["p_implicit"], d["label"]))
        values = content(folder / "evaluation.json")
        assert values["model"] == f"M{t + 1}"
        assert all(math.isfinite(v) for v in values.values() if not isinstance(v, str))
        assert values["selected"] == pytest.approx(np.mean([d["selected"] for d in decisions]))
    assert (run / "summary.json").exists() and (run / "export" / "model.safetensors").exists()
    folder = run / "iteration_01"
    return SimpleNamespace(
        steps=[row for row in steps if row["iteration"] == 1],
        pairs=lines(folder / "pairs.jsonl"),
        decisions=lines(folder / "decisions.jsonl"),
        folder=folder,
    )


# --- one whole run --------------------------------------------------------------------------------------------------


def test_files_of_a_run(whole):
    names = {p.name for p in whole.path.iterdir()} - {".lock"}
    folders = {f"iteration_{t:02d}" for t in range(ITERATIONS + 1)}
    single = {"config.yaml", "manifest.json", "metrics.jsonl", "data.json", "summary.json", "report.html"}
    assert names == single | folders | {"checkpoints", "export", "tensorboard"}
    assert {p.name for p in (whole.path / "checkpoints").iterdir()} == {f"M{n}" for n in range(ITERATIONS + 2)}
    evaluated = {"evaluation.json", "heldout_responses.jsonl", "seconds.json"}
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
                assert pair["start_logps"][i] == pytest.approx(row["logprob"], abs=1e-4)
            assert "label" not in pair and "frozen_logits" not in pair and pair["length_penalty"] == 0
        assert len(seen) == len(pairs)
        for prompt in {row["prompt"] for row in responses}:
            distinct = len({ids for p, ids in sampled if p == prompt})
            assert sum(pair["prompt"] == prompt for pair in pairs) == min(math.comb(distinct, 2), 2)
    assert len(set(used)) == len(used)  # consecutive parts of one permutation


def test_cached_log_probabilities_are_those_of_the_models(whole):
    session = Session(whole.config)
    store = ModelStore(whole.path / "checkpoints")
    for t in range(1, ITERATIONS + 1):
        pairs = lines(whole.path / f"iteration_{t:02d}" / "pairs.jsonl")
        items = [
            (session.encoder.prompt(pair["messages"]), session.encoder.sampled(pair[f"response_{side}_ids"]))
            for pair in pairs
            for side in "ab"
        ]
        start, lagging = (
            scoring.response_logps(session, store.load(n, session.abstract_trained), items).reshape(-1, 2)
            for n in (t, t - 1)
        )
        for role, expected in (("start", start), ("preference", start), ("implicit", lagging)):
            np.testing.assert_allclose([pair[f"{role}_logps"] for pair in pairs], expected, atol=1e-4)
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
        assert list(seconds) == (["sample", "references", "optimise", "evaluate"] if t else ["sft", "evaluate"])
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
    assert list(templates) == [f"generative.templates/{world_dir}/judge.yaml"]
    assert {"model.path/model.safetensors", "model.path/config.json", "model.path/tokenizer.json"} <= hashes.keys()
    for name, value in hashes.items():
        assert value == sha256(world_dir / "model" / name.removeprefix("model.path/"))
    assert manifest["seed"] == 0 and {"python", "jax", "scir_jax"} <= manifest["versions"].keys()


def test_the_export_is_the_last_model(whole):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    session = Session(whole.config)
    params = ModelStore(whole.path / "checkpoints").load(ITERATIONS + 1, session.abstract_params)
    rows = lines(whole.path / "iteration_02" / "responses.jsonl")
    network = AutoModelForCausalLM.from_pretrained(whole.path / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole.path / "export")
    longest = max(rows, key=lambda row: len(row["response_ids"]))
    ids = longest["prompt_ids"] + longest["response_ids"]
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0].numpy()
    hidden = session.model.hidden(params, np.array([ids], np.int32))
    found = np.einsum("td,vd->tv", np.asarray(hidden[0]), np.asarray(session.model.head(params)))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
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
    assert done.code == 2
    message = done.err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "another configuration" in message
    assert "optimise.learning_rate (0.001 there, 0.25 here)" in message and "run.seed (0 there, 7 here)" in message
    assert message.count(" there, ") == 2
    assert files(whole.path) == whole.files


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


# --- the same run again ---------------------------------------------------------------------------------------------


def test_programs_compile_once_and_the_same_seed_gives_the_same_model(configure, whole, tmp_path):
    file = configure(tmp_path / "run", run=dict(iterations=ITERATIONS, tensorboard=False), **WHOLE)
    config, _ = cli.parse("train", "", ["--config", str(file)])
    directory = RunDirectory(config.run.directory)
    assert directory.open(config) is False
    session = Session(config)
    metrics = Metrics(directory.path, tensorboard=False, wandb=False, config={})
    rows = Run(session, directory, metrics, console.Stopper()).run()
    metrics.close()
    directory.close()
    # One entry for SFT's batches and one for those of SCIR training.
    assert session.trainer.step._cache_size() == 2
    assert session.trainer._init._cache_size() == 1
    assert session.scorer._cache_size() == 1
    assert session.judge._cache_size() == 1
    assert sorted(session._samplers) == [1, RESPONSES]
    assert [program._cache_size() for program in session._samplers.values()] == [1, 1]

    export_model(session, directory, ITERATIONS + 1, directory.path / "export")
    for name, data in files(whole.path / "export").items():
        assert (directory.path / "export" / name).read_bytes() == data, name
    for n in range(ITERATIONS + 2):
        assert same(model(directory.path, n), model(whole.path, n)), n
    for t in range(1, ITERATIONS + 1):
        for name in ("responses", "pairs", "decisions", "heldout_responses"):
            place = f"iteration_{t:02d}/{name}.jsonl"
            assert (directory.path / place).read_bytes() == whole.files[place], place
    expected = content(whole.path / "summary.json")["rows"]
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]


def test_starting_from_another_runs_model(configure, whole, no_page, tmp_path):
    for seed in (0, 1):
        run = tmp_path / f"seed{seed}"
        file = configure(run, run=dict(start_from=str(whole.path), seed=seed), **WHOLE)
        assert train.main(["--config", str(file)]) == 0
        assert same(model(run, 0), model(whole.path, 0)) and same(model(run, 1), model(whole.path, 1))
        rows = lines(run / "metrics.jsonl")
        assert rows[0]["step"] == 1 and {row["stage"] for row in rows} == {"optimise"}
        # The iteration depends on M1 and the seed alone, not on how M1 came to be there.
        assert same(model(run, 2), model(whole.path, 2)) == (seed == 0)
        place = "iteration_01/responses.jsonl"
        assert ((run / place).read_bytes() == whole.files[place]) == (seed == 0)


def test_no_iterations_and_another_seed(configure, whole, tmp_path, command):
    run = tmp_path / "run"
    file = configure(run, run=dict(iterations=0, seed=1), data=dict(heldout_prompts=None))
    assert command(train.main, "--config", file).code == 0
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"M0", "M1"}
    assert same(model(run, 0), model(whole.path, 0)) and not same(model(run, 1), model(whole.path, 1))
    assert [row["model"] for row in content(run / "summary.json")["rows"]] == ["M1"]
    assert (run / "export" / "model.safetensors").exists() and (run / "report.html").exists()


# --- methods --------------------------------------------------------------------------------------------------------

# The logit whose sign is the label, from the frozen logits of the pair and the rewards of the step.
LABELS = {
    "consensus": lambda frozen, generative, implicit: frozen[0] + 2 * frozen[2],
    "consistency_only": lambda frozen, generative, implicit: generative + implicit,
    "implicit": lambda frozen, generative, implicit: frozen[1],
    "scir": lambda frozen, generative, implicit: generative + implicit,
    "selection_only": lambda frozen, generative, implicit: generative + implicit,
    "srlm": lambda frozen, generative, implicit: frozen[0],
}
COLUMNS = {"consensus": 3, "implicit": 2, "srlm": 2}
# Settings of the file that a method is laid over.
BENEATH = {"consistency_only": dict(consistency=dict(kind="js")), "external": dict(replay=dict(weight=0.0))}


def test_every_method_is_tried():
    assert {path.stem for path in METHODS.glob("*.yaml")} == {*LABELS, "external", "cream"}


@pytest.mark.parametrize("method", [*LABELS, "external"])
def test_methods(method, from_m1, whole, world_dir):
    arguments = ["--config", METHODS / f"{method}.yaml"]
    if method == "external":
        arguments += ["--data.pairs", world_dir / "eft.jsonl"]
    run = from_m1(*arguments, **BENEATH.get(method, {}))
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in yaml.safe_load((METHODS / f"{method}.yaml").read_text()).items():
        assert {key: recorded[section][key] for key in values} == values
    rows = check_iterations(run)
    assert not same(model(run, 1), model(run, 2))
    soft = recorded["preference"]["soft"]
    if method == "external":
        given = lines(world_dir / "eft.jsonl")
        assert [(p["prompt"], p["response_a"], p["response_b"]) for p in rows.pairs] == [
            (g["prompt"], g["chosen"], g["rejected"]) for g in given
        ]
        assert not (rows.folder / "responses.jsonl").exists()
        assert all(p["label"] == 1 for p in rows.pairs)
        assert all(d["label"] == 1 and d["selected"] for d in rows.decisions)
        assert all("sft" not in row for row in rows.steps)
        values = content(run / "iteration_01" / "evaluation.json")  # without a grader and held-out prompts
        assert "generative_accuracy" in values and not {"quality", "length", "label_accuracy"} & values.keys()
        return
    for row in rows.steps:
        assert "sft/eft" in row and (row["consistency"] or recorded["consistency"]["weight"] == 0)
    for pair in rows.pairs:
        assert len(pair.get("frozen_logits", ())) == COLUMNS.get(method, 0)
    for row in rows.decisions:
        frozen = rows.pairs[row["pair"]].get("frozen_logits")
        expected = LABELS[method](frozen, logit(row["p_generative"][0]), logit(row["p_implicit"]))
        if soft:
            assert row["label"] == pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-5)
        elif abs(expected) > 1e-4:
            assert row["label"] == float(expected > 0)
        assert row["selected"] == (row["agreed"] if recorded["selection"]["rule"] == "agreement" else True)


def test_cream_ranks_responses_with_two_models(from_m1):
    """Best against worst by log pi_1 - log pi_0; the label is the two rankings' agreement, counted pair by pair."""
    run = from_m1("--config", METHODS / "cream.yaml")
    rows = check_iterations(run)
    ours = {}
    for pair in rows.pairs:
        reward_a, reward_b = (s - r for s, r in zip(pair["start_logps"], pair["implicit_logps"], strict=True))
        assert reward_a > reward_b and 0 <= pair["label"] <= 1
        ours.setdefault(pair["prompt"], []).append(pair)
    assert all(len(pairs) == 1 for pairs in ours.values())
    assert len({pair["label"] for pair in rows.pairs}) == 1
    assert all(row["label"] == pytest.approx(rows.pairs[0]["label"]) for row in rows.decisions)


def test_external_labels_are_awaited(configure, whole, no_page, command, tmp_path):
    run = tmp_path / "run"
    settings = dict(sample=WHOLE["sample"], optimise=WHOLE["optimise"], **BENEATH["external"])
    file = configure(run, run=dict(start_from=str(whole.path)), data=dict(heldout_prompts=None), **settings)
    call = (train.main, "--config", file, "--config", METHODS / "external.yaml")
    pairs = run / "iteration_01" / "pairs.jsonl"
    for _ in range(2):
        done = command(*call)
        assert done.code == 2 and "Traceback" not in done.err
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and str(pairs) in errors[0] and "'label'" in errors[0] and "again" in errors[0]
        assert not (run / "checkpoints" / "M2").exists()
    rows = lines(pairs)
    labels = [row["pair"] % 2 for row in rows]
    pairs.write_text("".join(json.dumps({**row, "label": label}) + "\n" for row, label in zip(rows, labels)))
    assert command(*call).code == 0
    found = check_iterations(run)
    assert all(d["label"] == labels[d["pair"]] and d["selected"] for d in found.decisions)


# --- settings -------------------------------------------------------------------------------------------------------

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
        optimizer=dict(accumulate=2, weight_decay=0.1, schedule="linear"),
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
        optimizer=dict(schedule="constant"),
        replay=dict(ift_batch_size=4, weight=0.5),
        model=dict(remat="dots"),
    ),
}


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
        assert pair["start_logps"] == pair["implicit_logps"]
    assert re.search(r"\bM2\b", done.out) and "quality" not in done.out
    assert (run / "report.html").exists()
