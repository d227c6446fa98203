"""A run that stops after a stage, lies elsewhere, grows, or goes on from another run's later model."""

import shutil

import pytest
from huggingface_hub import constants

from scir_jax import evaluate, export, train
from scir_jax.run import hub
from tests.run import hub_cache
from tests.run.runs import ITERATIONS, WHOLE, content, files, lines, model, refused, same

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


def test_a_run_is_stopped_moved_and_changed_where_it_is_harmless(
    configure, whole, world_dir, no_page, command, tmp_path
):
    """It becomes the run that nothing happened to, to the bit, but for what was changed."""
    settings = dict(run=dict(iterations=ITERATIONS), **WHOLE)
    settings["data"] = dict(heldout_pairs=None)
    run, moved = tmp_path / "run", tmp_path / "moved"
    file = configure(run, **settings)
    done = command(train.main, "--config", file, "--run.until", "score:1")
    assert done.code == 0 and "stopped after score:1, as run.until says" in done.err and not done.out.startswith(" ")
    assert (run / "iteration_01" / "pairs.jsonl").exists() and not (run / "checkpoints" / "M2").exists()
    assert not (run / "summary.json").exists() and "score:1" not in (run / "config.yaml").read_text()

    run.rename(moved)
    world = shutil.copytree(world_dir, tmp_path / "world", symlinks=True)
    steps = len(lines(moved / "metrics.jsonl"))
    paths = [f"--data.{name}={world / name}.jsonl" for name in ("prompts", "ift", "eft", "heldout_prompts")]
    paths += ["--model.path", world / "model", "--generative.templates", f'["{world / "judge.yaml"}"]']
    more = ["--evaluate.greedy", "false", "--data.heldout_pairs", world / "heldout_pairs.jsonl"]
    call = (train.main, "--config", file, "--run.directory", moved, *paths)
    before = files(moved)
    refused(
        command(*call, "--data.prompts", world / "heldout_prompts.jsonl"), "changed since this run began: data.prompts"
    )
    refused(command(*call, "--data.eft", "null"), "these keys differ: data.eft")
    assert files(moved) == before
    done = command(*call, *more)
    assert done.code == 0 and "changed since the run began: evaluate.greedy, from True to False" in done.err
    assert f"python -m scir_jax.evaluate --run {moved} --again" in done.err
    changes = {change["key"]: change for change in content(moved / "manifest.json")["changes"]}
    assert changes["evaluate.greedy"] == {"step": steps, "key": "evaluate.greedy", "before": True, "now": False}
    assert changes["data.heldout_pairs"]["before"] is None
    assert changes["model.path"]["now"] == str(world / "model")
    for number in range(ITERATIONS + 2):
        assert same(model(moved, number), model(whole.path, number)), number
    rows = content(moved / "summary.json")["rows"]
    assert [("generative_accuracy" in row, "greedy_quality" in row) for row in rows] == [
        (False, True),
        *[(True, False)] * 2,
    ]
    # Other commands find it where it lies now, and evaluate the earlier model on what was added.
    assert command(export.main, moved, tmp_path / "model", "--model", "M1").code == 0
    assert command(evaluate.main, "--run", moved, "--again").code == 0
    rows = content(moved / "summary.json")["rows"]
    assert all("generative_accuracy" in row and "greedy_quality" not in row for row in rows)


def test_going_on_from_a_later_model_with_its_references(
    configure, whole, world_dir, no_page, command, tmp_path, monkeypatch
):
    """The model that is M0 in one run is the hub's for another role: both lead to the same log-probabilities."""
    run, again = tmp_path / "run", tmp_path / "again"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_found", {})
    first_commit, second_commit = "a" * 40, "b" * 40
    hub_cache.add(tmp_path / "cache", "someone/tiny", world_dir / "model", first_commit)
    settings = dict(WHOLE, implicit=dict(reference="base"), preference=dict(reference="someone/tiny"))
    file = configure(run, run=dict(start_from=f"{whole.path}:M2"), **settings)
    assert command(train.main, "--config", file).code == 0
    found = [model(run, 0), model(run, 1)]
    assert same(found[0], model(whole.path, 1)) and same(found[1], model(whole.path, 2))
    rows = lines(run / "iteration_01" / "pairs.jsonl")
    assert rows
    for row in rows:
        assert row["cached"]["implicit_logps"] == pytest.approx(row["cached"]["preference_logps"], abs=1e-5)
        assert row["cached"]["implicit_logps"] != pytest.approx(row["cached"]["start_logps"], abs=1e-3)
    assert any(
        name.startswith("preference.reference/model.safetensors") for name in content(run / "manifest.json")["sha256"]
    )
    # The commit is the run's, wherever the branch goes.
    hub_cache.add(tmp_path / "cache", "someone/tiny", world_dir / "model", second_commit)
    monkeypatch.setattr(hub, "_found", {})
    assert command(train.main, "--config", file).code == 0
    assert content(run / "manifest.json")["hub"]["preference.reference"]["commit"] == first_commit
    assert hub.directory("someone/tiny", "preference.reference").name == first_commit

    # Its own base is found by a run that goes on from it; what was not kept is refused.
    file = configure(again, run=dict(start_from=f"{run}:M2"), **settings)
    done = command(train.main, "--config", file, "--run.until", "score:1")
    assert done.code == 0, done.err
    first, second = (lines(one / "iteration_01" / "pairs.jsonl")[0] for one in (run, again))
    if first["prompt"] == second["prompt"] and first["response_a"] == second["response_a"]:
        assert first["cached"]["implicit_logps"][0] == pytest.approx(second["cached"]["implicit_logps"][0], abs=1e-5)
    refused(
        command(train.main, "--config", file, "--run.directory", tmp_path / "no", "--implicit.reference", "sft"),
        "holds no model 'sft', which a reference of this run is",
    )
    assert not (tmp_path / "no" / "checkpoints" / "M0").exists()
    refused(
        command(train.main, "--config", file, "--run.directory", tmp_path / "no", "--run.start_from", f"{run}:M9"),
        f"{run} holds no model M8",
    )
