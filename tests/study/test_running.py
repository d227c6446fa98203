"""Studies with a stand-in for the train command: order, tuning, failures, interruptions, what is done again, tables."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from scir_jax import ablate
from scir_jax.config import cli
from scir_jax.config.files import to_yaml
from scir_jax.study import plots, running
from tests.documents import BLOCK, ROOT
from tests.study.program import PEAK, quality

PROGRAM = ("-S", str(Path(__file__).with_name("program.py")))
"""an interpreter without packages, which begins in a moment"""
STUDY = {
    "methods": {
        "srlm": "methods/srlm",
        "scir": "methods/scir",
        "oracle": ["methods/oracle", {"optimise": {"epochs": 3}}],
    },
    "seeds": [1, 2],
    "iterations": 2,
    "against": "srlm",
}
TUNED = STUDY | {"tuning": {"seeds": [100], "grid": {"optimise.learning_rate": [1e-4, 2e-4]}, "extend": 3}}


@pytest.fixture
def study(tmp_path, monkeypatch, command):
    """study(content, *arguments) -> how the command ends on it, with runs that take a moment."""
    monkeypatch.setattr(running, "PROGRAM", PROGRAM)
    monkeypatch.setattr(running, "PAUSE", 0.02)
    file = tmp_path / "mine.yaml"

    def run(content, *arguments, figures=False):
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        with monkeypatch.context() as patch:
            if not figures:
                patch.setattr(plots, "write_plots", lambda *_: [])
            return command(ablate.main, file, "--output", tmp_path / "out", *arguments)

    return run


def calls(tmp_path) -> list[str]:
    """The runs that were begun since the last call, in order."""
    file = tmp_path / "out" / "calls.txt"
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def behave(tmp_path, **behaviour) -> None:
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "behaviour.json").write_text(json.dumps(behaviour))


def found(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))


def test_a_study_from_beginning_to_end(study, tmp_path):
    done = study(STUDY, figures=True)
    assert done.code == 0, done.err
    # All methods of a seed come before the next one's.
    assert calls(tmp_path) == [
        call
        for seed in (1, 2)
        for call in (
            f"starts/base/seed_{seed} 0",
            *(f"runs/{name}/as_it_is/seed_{seed} 2" for name in STUDY["methods"]),
        )
    ]
    result = found(tmp_path)
    assert result["missing"] == [] and list(result["tables"]) == ["2"]
    rows = {row["method"]: row for row in result["tables"]["2"]}
    rate = 1e-4  # the quickstart's
    mean = (quality(rate, 1, 2) + quality(rate, 2, 2)) / 2
    assert rows["scir"]["columns"]["quality"] == pytest.approx([mean, 0.0005])
    assert rows["sft"]["columns"]["quality"][0] == pytest.approx((quality(rate, 1, 0) + quality(rate, 2, 0)) / 2)
    assert rows["scir"]["differences"]["quality"]["mean"] == pytest.approx(0.0)
    gain = mean - rows["sft"]["columns"]["quality"][0]
    assert rows["scir"]["gains"]["quality"]["mean"] == pytest.approx(gain) and "gains" not in rows["sft"]
    assert f"| scir | {gain:+.3f} [" in done.out.partition("### Less sft, M1: answers")[2]
    assert rows["scir"]["shares"]["quality"]["share"] == pytest.approx(1.0)
    assert rows["scir"]["columns"]["cost.generated"] == [30, 0] and rows["scir"]["columns"]["cost.memory"] == [7, 0]
    assert 0 < rows["scir"]["columns"]["processor_seconds"][0] < 10
    assert f"| scir | {mean:.3f} ± 0.001 |" in done.out and "## Tuning" not in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"study.md", "study.csv", "curves.svg", "costs.svg"}
    # Again, with nothing to do; and from the file alone.
    before = (tmp_path / "out" / "study.md").read_text()
    assert study(STUDY).code == 0 and calls(tmp_path) == []
    (tmp_path / "out" / "study.md").unlink()
    assert (
        study(STUDY, "--dry_run").out == "0 of 8 runs to be made, about 0.0 hours (from the runs that are finished)\n"
    )
    with pytest.raises(SystemExit):
        ablate.command.main(lambda: ablate.main(["--from", str(tmp_path / "out" / "study.json")]))
    assert (tmp_path / "out" / "study.md").read_text() == before
    # A part of it, which is what a study of that part would say, but for the costs.
    part = ("--methods", "scir", "srlm", "--against", "scir", "--seeds", "2", "--iterations", "1")
    with pytest.raises(SystemExit):
        place = tmp_path / "part"
        ablate.command.main(
            lambda: ablate.main(["--from", str(tmp_path / "out" / "study.json"), "--output", str(place), *part])
        )
    result = json.loads((place / "study.json").read_text())
    rows = {row["method"]: row for row in result["tables"]["1"]}
    assert list(rows) == ["sft", *result["methods"]] and sorted(result["methods"]) == ["scir", "srlm"]
    assert rows["scir"]["columns"]["quality"][0] == pytest.approx(quality(rate, 2, 1)) and rows["scir"]["seeds"] == [2]
    assert list(result["tables"]) == ["1"] and "processor_seconds" not in rows["scir"]["columns"]
    assert "differences" not in rows["scir"] and rows["srlm"]["against"] == "scir"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--methods", "scir", "dpo", "--output", "part"), "--methods dpo: the study has "),
        (("--against", "nobody", "--output", "part"), "--against nobody: the study has "),
        (("--seeds", "1", "9", "--output", "part"), "--seeds 9: the study has 1, 2"),
        (("--iterations", "3", "--output", "part"), "--iterations 3: the study has 2"),
        (("--iterations", "1"), "would take the place of all of it: give another --output"),
        (("--jobs", "2"), "--from makes no runs"),
    ],
)
def test_parts_that_a_study_does_not_have(command, tmp_path, monkeypatch, option, words):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "study.json"
    against = {"srlm": "scir"}
    found = dict(methods=["scir", "srlm"], seeds=[1, 2], iterations=2, against=against, oracles=[], tuning={}, runs=[])
    file.write_text(json.dumps(found))
    assert words in command(ablate.main, "--from", file, *option).err
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_the_grid_grows_at_its_edge_until_the_peak_is_inside(study, tmp_path):
    done = study(TUNED)
    assert done.code == 0, done.err
    result = found(tmp_path)
    tuning = result["tuning"]["srlm"]
    rates = [point["settings"]["optimise.learning_rate"] for point in tuning["points"]]
    assert rates == [1e-4, 2e-4, 4e-4, 8e-4] and tuning["chosen"] == {"optimise.learning_rate": PEAK}
    assert (tuning["edges"], tuning["grown"], tuning["runs"]) == ([], 2, 4)
    assert tuning["points"][0]["score"] == pytest.approx(quality(1e-4, 100, 2))
    assert {run["settings"]["optimise.learning_rate"] for run in result["runs"] if run["kind"] == "table"} == {PEAK}
    assert "| srlm | learning_rate 0.0004 | inside | 4 |" in done.out
    # Fewer iterations are chosen by their own models, and need no run.
    calls(tmp_path)
    assert study(TUNED, "--iterations", "1").code == 0 and calls(tmp_path) == []
    assert found(tmp_path)["tuning"]["srlm"]["points"][0]["score"] == pytest.approx(quality(1e-4, 100, 1))
    # Without growth the edge is told.
    done = study(TUNED | {"tuning": TUNED["tuning"] | {"extend": 0}}, "--methods", "srlm")
    assert "| srlm | learning_rate 0.0002 | edge of optimise.learning_rate | 2 |" in done.out
    assert calls(tmp_path) == [f"runs/srlm/optimise.learning_rate=0.0002/seed_{seed} 2" for seed in (1, 2)]


def test_a_diverged_run_is_no_failure(study, tmp_path):
    behave(
        tmp_path, **{"learning_rate=0.0008": {"code": 5}, "oracle/optimise.learning_rate=0.0004/seed_2": {"code": 5}}
    )
    done = study(TUNED, "--methods", "srlm", "oracle")
    assert done.code == 0, done.err
    result = found(tmp_path)
    assert result["tuning"]["srlm"]["points"][-1] == {"settings": {"optimise.learning_rate": 8e-4}, "score": None}
    assert result["tuning"]["srlm"]["chosen"] == {"optimise.learning_rate": PEAK}
    rows = {row["method"]: row for row in result["tables"]["2"]}
    assert rows["oracle"]["seeds"] == [1] and rows["srlm"]["seeds"] == [1, 2]
    assert rows["oracle"]["differences"]["quality"]["seeds"] == 1 and "| oracle (seeds 1) |" in done.out
    assert (
        "**Diverged**, and in no mean: srlm (seed 100, tuning), oracle (seed 100, tuning), oracle (seed 2, table)"
        in done.out
    )


def test_failures_are_named_and_repaired(study, tmp_path):
    behave(tmp_path, **{"scir/as_it_is/seed_1": {"code": 2}, "starts/base/seed_2": {"code": 3}})
    done = study(STUDY)
    assert done.code == 1
    assert "table scir, seed 1, 2 iterations failed with exit code 2; its log ends with\n    some lines\n" in done.err
    assert "    error: what is wrong\n" in done.err and "start base, seed 2 failed with exit code 3" in done.err
    assert "2 runs failed; the same command tries them again" in done.err
    assert sorted(calls(tmp_path)) == sorted(
        ["starts/base/seed_1 0", "starts/base/seed_2 0"]
        + [f"runs/{name}/as_it_is/seed_1 2" for name in STUDY["methods"]]
    )
    assert "**Not all runs are there**: 5 are missing" in done.out and "| srlm |" in done.out
    behave(tmp_path)
    assert study(STUDY).code == 0
    assert len(calls(tmp_path)) == 5 and found(tmp_path)["missing"] == []


def test_longer_runs_grow(study, tmp_path):
    assert study(STUDY, "--methods", "srlm", "scir").code == 0
    calls(tmp_path)
    longer = STUDY | {"longer": {"scir": 4}}
    assert study(longer).code == 0
    assert calls(tmp_path)[-2:] == [f"runs/scir/as_it_is/seed_{seed} 4" for seed in (1, 2)]
    tables = found(tmp_path)["tables"]
    assert [row["method"] for row in tables["4"]] == ["sft", "scir"] and len(tables["2"]) == 4
    assert tables["4"][1]["columns"]["quality"][0] == pytest.approx(quality(1e-4, 1, 4) + 0.0005)
    two, four = (next(r for r in tables[n] if r["method"] == "scir")["columns"] for n in ("2", "4"))
    assert two["quality"][0] == pytest.approx(quality(1e-4, 1, 2) + 0.0005)
    assert (two["cost.generated"][0], four["cost.generated"][0]) == (30, 50)
    assert four["processor_seconds"][0] > two["processor_seconds"][0]


def test_other_settings_are_refused(study, tmp_path):
    assert study(STUDY, "--methods", "srlm").code == 0
    changed = STUDY | {"methods": {"srlm": ["methods/srlm", {"optimise": {"epochs": 7}}]}}
    done = study(changed)
    assert (
        done.code == 2 and "seed_1: was made with other settings (optimise.epochs); remove it and the files" in done.err
    )


def test_starts_are_shared_where_m1_is_the_same(study, tmp_path):
    content = STUDY | {"seeds": [1]}
    content["methods"] = {
        "srlm": "methods/srlm",
        "passes": ["methods/upo", {"generative": {"passes": 3}}],
        "rank": ["methods/scir", {"lora": {"rank": 2}}],
        "dropout": ["methods/scir", {"lora": {"rank": 2}, "sample": {"top_k": 3}}],
    }
    assert study(content).code == 0
    starts = sorted(call for call in calls(tmp_path) if call.startswith("starts"))
    assert len(starts) == 2 and sum(call.startswith("starts/base/") for call in starts) == 1
    assert [row["method"] for row in found(tmp_path)["tables"]["2"]][:2] == ["sft", "sft (rank)"]
    world = {
        yaml.safe_load(file.read_text())["world"]["directory"] for file in (tmp_path / "out" / "runs").rglob("*.yaml")
    }
    assert world == {str(tmp_path / "out" / "worlds" / "base" / "seed_1")}


def begin(tmp_path) -> subprocess.Popen:
    """Starts the study as a process of its own."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(STUDY, sort_keys=False), encoding="utf-8")
    code = "import sys; from scir_jax import ablate; from scir_jax.study import running; "
    code += "running.PROGRAM = (sys.argv.pop(1), sys.argv.pop(1)); ablate.command.main(ablate.main)"
    arguments = [sys.executable, "-c", code, *PROGRAM, str(file), "--output", str(tmp_path / "out"), "--jobs", "2"]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_stopped_study_ends_its_runs_and_goes_on(study, tmp_path):
    behave(tmp_path, seed_1={"sleep": 0}, **{"scir/as_it_is/seed_1": {"sleep": 60}})
    process = begin(tmp_path)
    file = tmp_path / "out" / "calls.txt"
    wait_for(lambda: file.exists() and "runs/scir/as_it_is/seed_1" in file.read_text())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert err.rstrip().endswith("stopped; the same command goes on where it was")
    lock = FileLock(tmp_path / "out" / "runs" / "scir" / "as_it_is" / "seed_1" / ".lock")
    lock.acquire(timeout=0)  # raises as long as the run's process lives
    lock.release()
    before = calls(tmp_path)
    behave(tmp_path)
    assert study(STUDY).code == 0
    again = calls(tmp_path)
    assert (
        "runs/scir/as_it_is/seed_1 2" in again
        and "starts/base/seed_1 0" in before
        and "starts/base/seed_1 0" not in again
    )


def test_runs_of_a_killed_study_are_waited_for(study, tmp_path):
    """A run outlives a study that was killed; the next one does not begin it a second time at once."""
    directory = tmp_path / "out" / "starts" / "base" / "seed_1"
    directory.mkdir(parents=True)
    lock = FileLock(directory / ".lock", thread_local=False)
    lock.acquire()
    begun = []

    def free() -> None:
        begun.extend(calls(tmp_path))
        lock.release()

    threading.Timer(1.0, free).start()
    directory.with_name("seed_1.json").write_text('{"open": true}')  # as the killed study left it
    done = study(STUDY, "--methods", "srlm")
    assert done.code == 0 and not any("seed_1" in call for call in begun)
    runs = {(run["kind"], run["seed"]): run for run in found(tmp_path)["runs"]}
    assert runs["start", 1]["processor_seconds"] is None and runs["start", 2]["processor_seconds"] > 0
    rows = {row["method"]: row["columns"] for row in found(tmp_path)["tables"]["2"]}
    assert rows["sft"]["processor_seconds"] == [runs["start", 2]["processor_seconds"], None]
    assert "a process of an earlier study is at work here; waiting for it" in done.err


def test_one_study_per_directory(study, tmp_path):
    lock = running.lock(tmp_path / "out")
    done = study(STUDY)
    assert done.code == 2 and "another ablate is running here" in done.err
    lock.release()
    file = tmp_path / "file"
    file.write_text("")
    assert study(STUDY, "--output", file).code == 2


def test_dry_run_and_missing_options(study, command, tmp_path):
    done = study(TUNED | {"longer": {"scir": 5}}, "--dry_run")
    lines = done.out.splitlines()
    assert done.code == 0 and len(lines) == 6 + 6 + 2 + 3 + 1 and not (tmp_path / "out" / "runs").exists()
    assert "tuning srlm optimise.learning_rate=0.0001, seed 100, 2 iterations" in lines
    assert "longer scir as tuning will find, seed 2, 5 iterations" in lines
    assert lines[-1].startswith("17 of 17 runs to be made, about ") and "a guess" in lines[-1]
    assert command(ablate.main, "studies/quick").code == 2
    assert "is no study.json" in command(ablate.main, "--from", tmp_path / "none.json").err


def test_cores_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 0, 5})
    assert running._shares(2) == [{0, 5}, {3}] and running._shares(1) == [{0, 3, 5}]
    assert running._shares(4) == [set()] * 4
    assert math.isclose(PEAK, 4e-4)


@pytest.mark.slow
@pytest.mark.documented("ablate studies/quick", "ablate --from runs/quick/study.json", "ablate compare.yaml")
@pytest.mark.documented("ablate runs/some", "ablate runs/methods", "ablate docs/results/methods.json")
@pytest.mark.documented("ablate studies/judges_untuned", "ablate studies/variations", "ablate studies/layouts")
@pytest.mark.documented("ablate studies/adapters", "ablate studies/templates", "ablate studies/sizes")
@pytest.mark.documented("ablate studies/responses", "ablate runs/judges_large", "ablate runs/large")
def test_the_documents_studies(documented, tmp_path, monkeypatch):
    """Each from beginning to end; the stand-in of the train command has the learning rate's peak at the same place."""
    quick, again, guides, some, of_record, its_tables, *others = documented
    names = ("judges", "variations", "layouts", "adapters", "templates", "sizes", "responses", "judges_large", "large")
    recorded = {"methods": of_record, **dict(zip(names, others, strict=True))}
    monkeypatch.setattr(running, "PROGRAM", PROGRAM)
    monkeypatch.setattr(running, "PAUSE", 0.005)
    monkeypatch.setattr(plots, "write_plots", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    done = quick()
    assert done.code == 0 and "| scir |" in done.out, done.err
    tables = Path("runs/quick/study.md")
    before = tables.read_text()
    tables.unlink()
    assert again().code == 0 and tables.read_text() == before

    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (file,) = [block for language, block in BLOCK.findall(guide) if language == "yaml"]
    Path("compare.yaml").write_text(file)
    Path("runs/mine").mkdir()
    Path("runs/mine/config.yaml").write_text(to_yaml(cli.parse("train", "", ["--model", "a", "--prompts", "b"])[0]))
    done = guides()
    assert done.code == 0, done.err
    result = json.loads(Path("runs/compare/study.json").read_text())
    assert result["missing"] == [] and [row["method"] for row in result["tables"]["2"]][1:] == [
        "srlm",
        "scir",
        "consensus",
    ]

    for output, one in {"some": some, **recorded}.items():
        words = one.command.line.split()
        file = ROOT / "configs" / f"{words[words.index('scir_jax.ablate') + 1]}.yaml"
        methods = list(yaml.safe_load(file.read_text())["methods"])
        if "--methods" in words:
            methods = [word for word in words[words.index("--methods") :] if word in methods]
        done = one() if "--seeds" in words else one("--seeds", "0", "1")
        assert done.code == 0, done.err
        result = json.loads(Path(f"runs/{output}/study.json").read_text())
        rows = {row["method"]: row for row in result["tables"]["4"]}
        # Methods whose M1 is another one have a row for it, "sft (method)".
        assert result["missing"] == [] and {"sft", *methods} == {name for name in rows if "(" not in name}
        chosen = {tuning["chosen"]["optimise.learning_rate"] for tuning in result["tuning"].values()}
        # The point that is nearest to it of the grid for adapters, 5e-4, is no edge.
        tuned = {PEAK, 5e-4} if output == "methods" else {PEAK} if output in ("some", "sizes") else set()
        assert chosen == tuned
        scir = "scir_large" if output == "sizes" else "scir"
        runs = [run for run in result["runs"] if run["method"] == scir and run["kind"] == "table"]
        assert len(runs) == len(result["seeds"]) >= 2

    # The results that the documents quote are these studies', and none of their runs is missing.
    shutil.copytree(ROOT / "docs" / "results", "docs/results")
    table = ""
    for name, one in recorded.items():
        assert its_tables(instead={"methods.json": f"{name}.json", "runs/record": f"runs/{name}_record"}).code == 0
        result = json.loads(Path(f"docs/results/{name}.json").read_text())
        assert result["command"].split() == one.command.line.split() and result["missing"] == []
        table += Path(f"runs/{name}_record/study.md").read_text()
    for name, output in {"methods": "three", "judges_large": "large_three"}.items():
        instead = {"methods.json": f"{name}.json", "runs/record": f"runs/{output}"}
        assert its_tables("--iterations", "3", instead=instead).code == 0
        table += Path(f"runs/{output}/study.md").read_text()
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    figures = set(re.findall(r"\d\.\d\d\d ± 0\.\d\d\d|[+-]\d\.\d\d\d \[.*?\]", page))
    assert len(figures) > 40 and sorted(one for one in figures if one not in table) == []
