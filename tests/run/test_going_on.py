"""A run directory is gone on with: more iterations, another run's models; and what is refused."""

import pytest
import yaml

from scir_jax import train
from tests.run.runs import ITERATIONS, WHOLE, check_iterations, content, files, lines, model, refused, same

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


def lines_of(data: bytes) -> int:
    return data.count(b"\n")


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{**row, "seconds": 0} for row in rows]


def test_a_finished_run_goes_on_to_more_iterations(configure, whole, no_page, command, tmp_path):
    """It becomes the run that had as many from the beginning, to the bit, and what was there stays as it was."""
    run = tmp_path / "run"
    call = (train.main, "--config", configure(run, run=dict(iterations=1), **WHOLE))
    done = command(*call)
    assert done.code == 0 and "M2" in done.out and "M3" not in done.out
    before = files(run)

    done = command(*call, "--run.iterations", ITERATIONS)
    assert done.code == 0 and all(f"M{n}" in done.out for n in range(1, ITERATIONS + 2))
    after = files(run)
    changed = {name for name in before if after[name] != before[name]}
    changed -= {"files.json"}
    assert changed == {
        *("config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "checkpoints/arrays.json"),
        *("export/model.safetensors", "export/README.md"),
    }
    (change,) = content(run / "manifest.json")["changes"]
    assert change == {
        "step": lines_of(before["metrics.jsonl"]),
        "key": "run.iterations",
        "before": 1,
        "now": ITERATIONS,
    }
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    recorded = [yaml.safe_load(found["config.yaml"]) for found in (before, after)]
    assert [found["run"].pop("iterations") for found in recorded] == [1, ITERATIONS] and recorded[0] == recorded[1]
    check_iterations(run, ITERATIONS)

    for n in range(ITERATIONS + 2):
        assert same(model(run, n), model(whole.path, n)), n
    for name, data in files(whole.path / "export").items():
        assert after[f"export/{name}"] == data, name
    for t in range(1, ITERATIONS + 1):
        for name in ("responses", "pairs", "decisions", "heldout_responses"):
            place = f"iteration_{t:02d}/{name}.jsonl"
            assert after[place] == whole.files[place], place
    rows = content(run / "summary.json")["rows"]
    assert [row["model"] for row in rows] == [f"M{n}" for n in range(1, ITERATIONS + 2)]
    assert without_seconds(rows) == without_seconds(content(whole.path / "summary.json")["rows"])

    refused(command(*call), f"these keys differ: run.iterations ({ITERATIONS} there, 1 here)")
    done = command(*call, "--run.iterations", 3, "--optimise.learning_rate", 0.25)
    refused(done, "these keys differ: optimise.learning_rate (0.001 there, 0.25 here)")
    assert command(*call, "--run.iterations", ITERATIONS).code == 0
    assert files(run) == after


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
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"M0", "M1", "arrays.json"}
    assert same(model(run, 0), model(whole.path, 0)) and not same(model(run, 1), model(whole.path, 1))
    assert [row["model"] for row in content(run / "summary.json")["rows"]] == ["M1"]
    assert (run / "export" / "model.safetensors").exists() and (run / "report.html").exists()
