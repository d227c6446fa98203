"""A study of real runs, tiny ones, in this process: what it gives every run is what the train command takes."""

import json

import pytest
import yaml

from scir_jax import ablate, train
from scir_jax.run import command as commands
from scir_jax.study import plots, running
from tests.run.runs import WHOLE, content, like_whole, model, same

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs", "no_page")]


class Here:
    """A run in this process, in the place of running.Process."""

    def __init__(self, file, log, cores):
        self.used = 0.1
        log.touch()
        with pytest.raises(SystemExit) as end:
            commands.main(lambda: train.main(["--config", str(file)]))
        self.code = end.value.code

    def ended(self) -> bool:
        return True

    def signal(self, number: int) -> None:
        raise AssertionError("nothing is under way")


def test_a_study_of_real_runs(configure, whole, command, monkeypatch, tmp_path):
    """Both methods go on from the M1 that is the whole run's, and the longer one from where it was."""
    monkeypatch.setattr(running, "Process", Here)
    monkeypatch.setattr(plots, "write_plots", lambda *_: [])
    base = configure(
        tmp_path / "base", **like_whole({"run": dict(tensorboard=False)}) | {"evaluate": WHOLE["evaluate"]}
    )
    study = {
        "base": str(base),
        # One program for both.
        "methods": {"scir": "methods/scir", "faster": ["methods/scir", {"optimise": {"learning_rate": 0.003}}]},
        "seeds": [whole.config.run.seed],
        "iterations": 1,
        "against": "faster",
    }
    file = tmp_path / "tiny.yaml"
    output = tmp_path / "out"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    done = command(ablate.main, file, "--output", output)
    assert done.code == 0, done.err
    found = content(output / "study.json")
    assert found["missing"] == [] and [run["method"] for run in found["runs"]] == ["sft", "scir", "faster"]
    start = output / "starts" / "base" / "seed_0"
    run = output / "runs" / "scir" / "as_it_is" / "seed_0"
    assert same(model(start, 1), model(whole.path, 1)) and same(model(run, 1), model(start, 1))
    rows = content(run / "summary.json")["rows"]
    row = next(row for row in found["tables"]["1"] if row["method"] == "scir")
    for column in ("quality", "greedy_quality", "distinct", "generative_accuracy", "agreement"):
        assert row["columns"][column] == [rows[-1][column], None]
    # One more iteration, of one method, after the rest.
    file.write_text(yaml.safe_dump(study | {"longer": {"scir": 2}}, sort_keys=False))
    done = command(ablate.main, file, "--output", output)
    assert done.code == 0, done.err
    again = json.loads((output / "study.json").read_text())
    longer = next(run for run in again["runs"] if run["kind"] == "longer")
    assert len(longer["rows"]) == 3 and longer["rows"][:2] == found["runs"][1]["rows"]
